"""What a message must tell, whatever its wording."""

import re


def tells(text: str, *facts: str) -> bool:
    """Whether one line of the text has all of these: keys, numbers, names, as words of their own."""
    patterns = [re.compile(rf"(?<![\w.]){re.escape(fact)}(?!\w|\.\d)") for fact in facts]
    return any(all(pattern.search(line) for pattern in patterns) for line in text.splitlines())
