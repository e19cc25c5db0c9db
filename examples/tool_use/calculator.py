"""The tool, and the reward."""

import re
from operator import add, mul, sub


def calculate(expression: str) -> int:
    """Calculates with whole numbers.

    Args:
        expression: two numbers with +, - or * between them
    """
    left, sign, right = re.fullmatch(r"(\d+)([*+-])(\d+)", expression).groups()
    return {"*": mul, "+": add, "-": sub}[sign](int(left), int(right))


def score(sample) -> float:
    """1 where the model's last turn is the right number and nothing else."""
    return float(sample.response_text.splitlines()[-1:] == [str(sample.prompt.answer)])


def used_tool(sample) -> float:
    """1 where the model called the tool."""
    return float(sample.metadata["turns"] > 1)
