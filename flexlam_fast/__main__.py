"""``python -m flexlam_fast`` is the same as ``flexlam-fast``."""

from flexlam_fast.cli import main

if __name__ == "__main__":
    main()
