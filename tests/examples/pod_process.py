"""The pod job as a process of a `tests.processes.Job`: ``step signal flags...``.

The last process gets the signal once it has recorded the step; 0 is none.
"""

import os
import sys

from jlora.examples.pod import __main__ as job
from jlora.examples.pod import metrics
from tests.processes import ADDRESS, COUNT, INDEX


def main():
    step, number = map(int, sys.argv[1:3])
    count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
    add = metrics.Recorder.add

    def adding(self, done, told):
        told = add(self, done, told)
        if number and done == step and index == count - 1:
            os.kill(os.getpid(), number)
        return told

    metrics.Recorder.add = adding
    joined = ["--coordinator", os.environ[ADDRESS], "--processes", str(count), "--process", str(index)]
    return job.main([*sys.argv[3:], *(joined if count > 1 else ["--distributed", "off"])])


if __name__ == "__main__":
    sys.exit(main())
