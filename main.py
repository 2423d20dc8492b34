"""Train, sweep, report or explain: ``python main.py --helpshort`` lists the flags."""

from bs_jax.cli.main import main

if __name__ == "__main__":
    main()
