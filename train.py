"""The one entrypoint: `python train.py [key=value ...]`, sweeps with -m; see README.md."""

from rlhf_exp.app.main import main

if __name__ == "__main__":
    main()
