"""What holds for every test."""

import os
import signal

# Read when numpy and torch are loaded: many threads on few cores make small arithmetic slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A shell without job control starts what it puts in the background with Ctrl-C ignored, and nohup ignores the hangup;
# processes inherit that, and what they do at these signals is tested.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)
