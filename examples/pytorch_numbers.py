"""Numbers for a loop that is not JAX's: every hyperparameter before and after, with warnings.

    python examples/pytorch_numbers.py
    python examples/pytorch_numbers.py --batch_size=1024 --noise_scale=2000

``torch.optim.AdamW`` means the same by the same numbers; its betas are (b1, b2). A rule that is
nothing but numbers serves: "sqrt", "linear", "power(a)". The rules that measure need statistics
of the micro-batches at every update, which numbers alone cannot give.
"""

from __future__ import annotations

import argparse

import bs_jax


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=256, help="examples in an update")
    parser.add_argument("--noise_scale", type=float, help="examples, where it was measured")
    flags = parser.parse_args(arguments)

    table = bs_jax.explain(
        "adamw",
        batch_size=flags.batch_size,
        base_batch_size=64,
        rule="sqrt",
        noise_scale=flags.noise_scale,
        train_examples=1_000_000,
        learning_rate=1e-3,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        ema_decay=0.9999,
        roles={"ema_decay": "decay"},
    )
    print(table.to_markdown())
    new = {row["hyperparameter"]: row["new"] for row in table.rows}
    print(f"\ntorch.optim.AdamW(parameters, lr={new['learning_rate']:.6g},"
          f" betas=({new['b1']:.6g}, {new['b2']:.6g}), eps={new['eps']:.6g},"
          f" weight_decay={new['weight_decay']:.6g})")  # fmt: skip
    return new


if __name__ == "__main__":
    main()
