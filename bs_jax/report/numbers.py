"""Numbers as a reader wants them: percent and points, fractions for k, p-values, lists."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Units:
    """How one metric is written: an accuracy in percent and points, anything else as it is."""

    metric: str

    @property
    def name(self) -> str:
        """The metric's name in words.

        >>> Units("eval/smoothed_accuracy").name
        'smoothed accuracy'
        """
        return self.metric.rsplit("/", 1)[-1].replace("_", " ")

    @property
    def percent(self) -> bool:
        """Whether the metric is a fraction that reads better as a percentage."""
        return "accuracy" in self.metric

    @property
    def factor(self) -> float:
        """What a value is multiplied by before it is shown."""
        return 100.0 if self.percent else 1.0

    def value(self, value: float) -> str:
        """A value of the metric.

        >>> Units("eval/accuracy").value(0.8206), Units("eval/loss").value(0.50204)
        ('82.06 %', '0.5020')
        """
        if not math.isfinite(value):
            return "–"
        return f"{100 * value:.2f} %" if self.percent else f"{value:.4f}"

    def signed(self, difference: float) -> str:
        """A difference without its unit, sign included.

        >>> Units("eval/accuracy").signed(-0.0247)
        '−2.47'
        """
        if not math.isfinite(difference):
            return "–"
        text = f"{100 * difference:+.2f}" if self.percent else f"{difference:+.4f}"
        return text.replace("-", "−")

    def spread(self, size: float) -> str:
        """A margin, a standard deviation or half an interval.

        >>> Units("eval/accuracy").spread(0.01)
        '1.00 points'
        """
        if not math.isfinite(size):
            return "–"
        return f"{100 * size:.2f} points" if self.percent else f"{size:.4f}"


_PARTS = {"train": "training", "eval": "evaluation", "optim": "optimizer's"}


def in_words(metric: str) -> str:
    """A metric's name in words.

    >>> in_words("train/loss"), in_words("eval/smoothed_accuracy"), in_words("acc")
    ('training loss', 'evaluation smoothed accuracy', 'acc')
    """
    part, _, name = metric.rpartition("/")
    return f"{_PARTS.get(part, part)} {name.replace('_', ' ')}".strip()


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(4.2), duration(95), duration(7300), duration(math.nan)
    ('4.2 s', '1 min 35 s', '2 h 1 min', '–')
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def whole(number: float) -> str:
    """A number to the nearest whole one.

    >>> whole(1920.0), whole(math.nan)
    ('1,920', '–')
    """
    return f"{number:,.0f}" if math.isfinite(number) else "–"


def share(part: float) -> str:
    """A share of something.

    >>> share(0.625), share(math.nan)
    ('62 %', '–')
    """
    return f"{100 * part:.0f} %" if math.isfinite(part) else "–"


def fraction(k: float) -> str:
    """A ratio of batch sizes.

    >>> fraction(0.25), fraction(4.0), fraction(1.5)
    ('1/4', '4', '3/2')
    """
    near = Fraction(k).limit_denominator(1024)
    return str(near) if near and math.isclose(float(near), k, rel_tol=1e-9) else f"{k:.4g}"


def p_value(p: float) -> str:
    """A p-value with as many digits as anyone acts on.

    >>> p_value(0.0431), p_value(0.00004), p_value(float("nan"))
    ('0.043', '<0.001', '–')
    """
    if not math.isfinite(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def listed(items: Sequence[str]) -> str:
    """Words in a row, as a sentence has them.

    >>> listed(["16", "32", "256"])
    '16, 32 and 256'
    """
    return " and ".join([*([", ".join(items[:-1])] if items[:-1] else []), *items[-1:]])


def count(number: int, noun: str) -> str:
    """A number and its noun.

    >>> count(1, "seed"), count(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def hyperparameter(value: float | None) -> str:
    """A hyperparameter's value; None is one that varies while training.

    >>> hyperparameter(0.002), hyperparameter(None), hyperparameter(0.984497)
    ('0.002', 'varies', '0.9845')
    """
    return "varies" if value is None else f"{value:.4g}"
