"""`accelerate launch -m fs_psm_hf.training --stage purifier ...`: train a PSM; the same as `fs-psm train`."""

import sys

from huggingface_hub.errors import StrictDataclassError

from ..heap import keep_freed_memory
from .arguments import make_parser, parse_arguments
from .trainer import TrainingDiverged, train


def main(argv=None):
    """Train; a user's mistake is one line and exit code 2, a loss that is NaN one line and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(make_parser().format_help())
        return
    keep_freed_memory()
    try:
        train(parse_arguments(argv))
    except (StrictDataclassError, ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"fs-psm train: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except TrainingDiverged as error:
        sys.stderr.write(f"fs-psm train: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
