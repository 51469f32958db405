"""Where the names of points go: beside their point, on no other name or point, inside the axes.

Pure geometry in typographic points, without a plotting library.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

DISTANCES = (5, 10, 18, 28, 40, 55, 75, 100, 130, 170)
ANGLES = tuple(math.radians(a) for a in (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240))
MARKER = 4.5  # half the width of a marker with some air
GAP = 2.0  # air around a name
ON_LINE = 25.0  # a name on the sweep's line is as bad as one this much farther away
AT_ANOTHER = 40.0  # and worse is one nearer to another point than to its own, which would be read as that one's


class Box(NamedTuple):
    """A rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        """Whether two rectangles share any area."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.top <= other.bottom or other.top <= self.bottom)

    def inside(self, other: "Box") -> bool:
        """Whether this rectangle lies wholly in another."""
        wide = other.left <= self.left and self.right <= other.right
        return wide and other.bottom <= self.bottom and self.top <= other.top


Point = tuple[float, float]
Segment = tuple[Point, Point]


def place_labels(
    points: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    markers: Sequence[Point],
    lines: Sequence[Segment],
) -> list[Box | None]:
    """A box for the name of each point, or None where no free place is left.

    `markers` are all drawn points, `lines` those that a name should rather not cover.
    """
    obstacles = [around(marker, 2 * MARKER, 2 * MARKER) for marker in markers]
    leaders: list[Segment] = []
    placed: list[Box | None] = []
    for point, size in zip(points, sizes, strict=True):
        best = min(
            (
                (cost(box, point, distance, lines, leaders, obstacles) + misread(box, point, points), n, box)
                for n, (distance, box) in enumerate(candidates(point, size))
                if box.inside(area) and not any(box.overlaps(other) for other in obstacles)
            ),
            default=(0, 0, None),
        )[2]
        placed.append(best)
        if best is not None:
            obstacles.append(Box(best.left - GAP, best.bottom - GAP, best.right + GAP, best.top + GAP))
            leaders.append((point, nearest(best, point)))
    return placed


def candidates(point: Point, size: tuple[float, float]) -> list[tuple[float, Box]]:
    """The boxes to try for one name, the nearest and most usual first, each with its distance."""
    width, height = size
    found = []
    for distance in DISTANCES:
        for angle in ANGLES:
            across, up = math.cos(angle), math.sin(angle)
            x = point[0] + across * (MARKER + distance + width / 2)
            y = point[1] + up * (MARKER + distance + height / 2)
            found.append((distance, around((x, y), width, height)))
    return found


def cost(
    box: Box,
    point: Point,
    distance: float,
    lines: Sequence[Segment],
    leaders: Sequence[Segment],
    obstacles: Sequence[Box],
) -> float:
    """How bad a free place is: far away, on a line, on a leader, or with a leader over something else."""
    leader = (point, nearest(box, point))
    own = around(point, 2 * MARKER, 2 * MARKER)
    over = sum(crosses(leader, other) for other in obstacles if other != own)
    return distance + ON_LINE * (over * 2 + sum(crosses(line, box) for line in (*lines, *leaders)))


def misread(box: Box, point: Point, points: Sequence[Point]) -> float:
    """How much worse a place is for being nearer to another point."""
    own = math.dist(point, nearest(box, point))
    return AT_ANOTHER if any(math.dist(other, nearest(box, other)) < own - 0.5 for other in points) else 0.0


def around(center: Point, width: float, height: float) -> Box:
    """The rectangle of a size around a centre."""
    x, y = center
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def nearest(box: Box, point: Point) -> Point:
    """The point of a rectangle that is nearest to a point outside it."""
    return (min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top))


def crosses(segment: Segment, box: Box, samples: int = 40) -> bool:
    """Whether a straight line passes through a rectangle, to the accuracy of its sampled points."""
    (x0, y0), (x1, y1) = segment
    shares = (n / samples for n in range(samples + 1))
    return any(
        box.left < x0 + (x1 - x0) * share < box.right and box.bottom < y0 + (y1 - y0) * share < box.top
        for share in shares
    )
