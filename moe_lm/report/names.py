"""Names of runs, broken into lines short enough for a plot."""


def wrapped(name: str, width: int) -> str:
    """A name in lines of at most `width` letters, broken after commas where it has any."""
    lines = [""]
    for part in name.replace(",", ",\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return "\n".join(lines)
