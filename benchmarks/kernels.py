"""Times the kernels on this machine's GPU: the same as `farskip bench kernels`, for use from a checkout.

python benchmarks/kernels.py [--models deepseek_v3 ...] [--tokens 8192 ...] [--ops route ...] [--out folder]
"""

import sys

from farskip.launch.bench_kernels import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
