"""Pathfinder as in Long Range Arena: are two dots on one dashed curve? 32 x 32 pixels, and 128 x 128 (Path-X).

Rules (Linsley et al., arXiv:1805.08315; drewlinsley/pathfinder, snakes.py and snakes2.py; the sizes are those of
google-research/long-range-arena, lra_benchmarks/data/pathfinder.py, hard split, which its results are on):

- Two curves of 14 dashes grow in turn, a dash each. The first starts at a random place at least twice `seed_distance`
  from the border, the second `seed_distance` away from there, both in a random direction of whole degrees.
- A curve goes on from its pivot, `margin` pixels beyond its last dash. The end of the next dash is one of the pixels on
  a circle around the pivot, drawn with probability cos^2(min(continuity * turn, 90 degrees)), less where other dashes
  are near. Its surroundings (the dash widened by `margin`) must not overlap those of the dashes that are there, the
  curve's last one apart; after three draws, both curves start again from nothing.
- Then up to `distractors` curves of 4 dashes, each tried five times.
- One end of one curve has a dot, and the far end of the same curve (label 1) or of the other (label 0), at even odds.
- Dashes are drawn at twice the size and scaled down with a Lanczos filter; a picture's brightest pixel becomes 255.
- 200,000 pictures: the first 80 % to train, 10 % to validate, 10 % to test.

A first dash needs a place where the surroundings of a dash in its direction are free. The original looks at the pixels
of those surroundings that are full after scaling down, laid on every pixel of the picture by OpenCV's dilation. Where
they lie to one side and miss the picture's corner, OpenCV gives its least number there, the original takes any negative
number for `no place`, and the try is over. So at 32 x 32 curves start in few directions, and 1.2 of 5 distractors come
about on average. That, too, is kept: it's what the published program draws.

In the 32 x 32 pictures the two long curves have contrast 0.75 * 2 and the distractors 2, since the original's program
applies the dashes' contrast to the long ones only. Also kept: the first curve's last dash is not marked as occupied, so
a distractor may come close to it. Single dashes as distractors are off, as in the original's script.

What differs: the random numbers; and a place to start a distractor is found by drawing places until a free one comes
instead of listing all free ones, which gives the same distribution. Path-X as published may hold more distractors than
LRA's text says (LRA's issue 38; others report 15 from there). The text's 35 / (14 / 3), that is 8, is the default here;
`distractors` changes it.

Checked against the original's program, run with these settings (900 pictures of 32 x 32, 60 of 128 x 128): histogram of
grey levels, the mean picture and the number of distractors agree within sampling error.

Every dash is one of a few hundred stamps (360 first directions, and one for each pixel of the circle), so many pictures
grow side by side in NumPy, and those that fail are dropped. A CPU core draws 970 pictures/s of 32 x 32 and 42/s of
128 x 128 (processor time): 200,000 take two minutes and 40 minutes on two cores. Most of Path-X' time goes into the 470
attempts that its rules need for each picture. The original's program drew 7 and 0.2 a second on such a core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from chela_plugin.harness.task_configs.lra import PathfinderTask
from chela_plugin.harness.tasks import Examples, Split
from chela_plugin.harness.tasks.lra_chunks import Arrays, chunks
from chela_plugin.harness.tasks.lra_image import pixel_sequences

VERSION = 1  # of the rules below: the same config with another version is other data
CHUNK = 500  # pictures a file
SCALE = 2  # dashes are drawn so many times larger, then scaled down
CONTOUR, DISTRACTOR = 14, 4  # dashes of a curve
DASH_TRIALS, DISTRACTOR_TRIALS = 3, 5
OCCUPIED = 0.3 * 255  # a place is free where nothing around it is more than this
OVERLAP = 1.8 * 255  # two surroundings that sum to this somewhere collide
AVAILABLE = 0.01  # share of free pixels below which no further distractor starts


@dataclass(frozen=True)
class Rules:
    """Lengths in pixels; see the module's text."""

    size: int
    seed_distance: int
    marker_radius: float
    length: int
    thickness: float
    margins: tuple[int, ...]
    continuity: float
    contour_contrast: float
    distractor_contrast: float


RULES = {
    32: Rules(32, 7, 1.5, 2, 0.5, (1,), 1.0, 1.5, 2.0),
    128: Rules(128, 20, 3.0, 5, 1.5, (2, 3), 1.8, 0.9, 0.9),
}


def examples(config: PathfinderTask, split: Split) -> Examples:
    """Inputs: the pictures row by row, as `config.inputs` says; targets `[N]`: 1 if the dots are on one curve."""
    first = {"train": 0, "validation": config.examples * 8 // 10, "test": config.examples * 9 // 10}[split]
    last = {"train": config.examples * 8 // 10, "validation": config.examples * 9 // 10, "test": config.examples}[split]
    parameters = {
        "size": config.size,
        "distractors": config.distractors,
        "seed": config.data_seed,
        "examples": min(CHUNK, config.examples),
    }
    pictures = parameters["examples"]
    numbers = range(first // pictures, -(-last // pictures))
    skip = first - numbers[0] * pictures
    images = np.empty((len(numbers) * pictures, config.size, config.size), np.uint8)
    labels = np.empty(len(images), np.int64)
    for i, arrays in enumerate(chunks("lra_pathfinder", VERSION, parameters, numbers)):
        images[i * pictures : (i + 1) * pictures] = arrays["images"]
        labels[i * pictures : (i + 1) * pictures] = arrays["labels"]
    rows = slice(skip, skip + last - first)
    return pixel_sequences(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]), 2, config.inputs)


def chunk(parameters: Mapping[str, Any], number: int) -> Arrays:
    """`parameters['examples']` pictures: `images` `[N, size, size]` uint8, `labels` `[N]` uint8."""
    rng = np.random.default_rng([parameters["seed"], number])
    pictures = draw(rng, parameters["examples"], RULES[parameters["size"]], parameters["distractors"])
    return {"images": pictures.images, "labels": pictures.labels}


@dataclass
class Pictures:
    """Pictures and the curves that they were drawn from.

    images: `[N, size, size]` uint8. labels: `[N]` uint8. dots: `[N, 2, 2]` (row, column) of the two dots.
    curves: `[N, 2 + distractors, 14, 2, 2]` int16, the two ends (row, column) of each dash, nearer to the curve's start
    first; -1 where a curve has no such dash. The first two are the long ones.
    """

    images: np.ndarray
    labels: np.ndarray
    dots: np.ndarray
    curves: np.ndarray


def draw(rng: np.random.Generator, count: int, rules: Rules, distractors: int) -> Pictures:
    """`count` pictures of the given rules."""
    labels = rng.integers(0, 2, count)
    margins = rng.integers(0, len(rules.margins), count)
    shape = (count, rules.size, rules.size)
    images = np.zeros(shape, np.uint8)
    dots = np.zeros((count, 2, 2), np.int64)
    curves = np.full((count, 2 + distractors, CONTOUR, 2, 2), -1, np.int16)
    for i, margin in enumerate(rules.margins):
        rows = np.flatnonzero(margins == i)
        if len(rows):
            grown = _Growth(_stamps(rules, margin), rng)
            dashes = grown.pictures(len(rows), distractors)
            images[rows], dots[rows] = grown.render(dashes, labels[rows])
            curves[rows] = grown.ends(dashes)
    return Pictures(images, labels.astype(np.uint8), dots, curves)


def _translate(place: np.ndarray, angle: np.ndarray, distance: float) -> np.ndarray:
    """Places (row, column) moved along an angle and rounded up, as the original rounds."""
    step = np.stack((distance * np.sin(angle), distance * np.cos(angle)), -1)
    return np.ceil(place + step).astype(np.int64)


def _flip(angle: np.ndarray) -> np.ndarray:
    return np.where(angle < 0, angle + np.pi, angle - np.pi)


def _shrink(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8, scaled to `size` x `size` with a Lanczos filter."""
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class _Prints:
    """Small pictures as lists of their pixels that aren't zero: relative places `[P, M, 2]`, `values` `[P, M]` uint8.

    Shorter lists repeat their first pixel.
    """

    at: np.ndarray
    values: np.ndarray


def _prints(pictures: list[np.ndarray]) -> _Prints:
    places = [np.argwhere(picture) for picture in pictures]
    longest = max(map(len, places))
    filled = [np.concatenate((at, np.repeat(at[:1], longest - len(at), 0))) for at in places]
    values = [picture[at[:, 0], at[:, 1]] for picture, at in zip(pictures, filled, strict=True)]
    return _Prints(np.stack(filled) - len(pictures[0]) // 2, np.stack(values))


@dataclass(frozen=True)
class _Stamps:
    """Every dash that can occur, as a small picture around the point from which it is drawn.

    A stamp's number is 0..359 for first dashes (degrees + 180), drawn from the curve's start, and 360 + k for a dash
    that ends at the circle's pixel k and is drawn from there back. Values are 0 to 255, as the original's are.
    """

    rules: Rules
    margin: int
    rim: int  # how far a stamp, or a curve that leaves the picture, can reach beyond it
    angles: np.ndarray  # [360 + K] the curve's direction
    drawn: np.ndarray  # [360 + K] the direction in which the dash is drawn
    lines: _Prints  # the dash
    masks: _Prints  # its surroundings: the dash widened by the margin
    wider: _Prints  # the surroundings widened by the margin again
    circle: np.ndarray  # [K, 2] pixels at length + margin from a pivot
    weights: np.ndarray  # [360 + K, K] float32, of going on to the circle's pixel k after stamp s
    footprints: list[np.ndarray]  # 360 x [F, 2] pixels, relative to a first dash's start, that must be free; or none
    starts: list[np.ndarray]  # 360 x [n, 2] places where a picture's first curve may start


@lru_cache
def _stamps(rules: Rules, margin: int) -> _Stamps:
    reach = rules.length + margin
    radius = rules.length + math.ceil(rules.thickness) + margin
    # One sample for each pixel of the circumference; whole pixels, each once.
    samples = np.arange(0, 360, 360 / (2 * reach * np.pi)) * np.pi / 180
    circle = np.unique(np.floor(np.stack((reach * np.sin(samples), reach * np.cos(samples)), -1)).astype(int), axis=0)
    onward = np.arctan2(circle[:, 0], circle[:, 1])
    angles = np.concatenate((np.arange(-180, 180) * np.pi / 180, onward))
    drawn = np.concatenate((angles[:360], _flip(onward)))
    disc = _disc(margin * SCALE)
    lines, masks = [], []
    for angle in drawn:
        centre = radius * SCALE
        head = _translate(np.array([centre, centre]), angle, rules.length * SCALE)
        large = Image.new("L", (2 * centre + 1, 2 * centre + 1))
        ends = [(centre, centre), (int(head[1]), int(head[0]))]
        ImageDraw.Draw(large).line(ends, fill=255, width=round(rules.thickness * SCALE))
        line = np.asarray(large)
        lines.append(_shrink(line, 2 * radius + 1))
        masks.append(_shrink(_dilate(line, disc), 2 * radius + 1))
    turn = np.abs(onward[None] - angles[:, None])
    turn = np.minimum(np.minimum(turn, 2 * np.pi - turn) * rules.continuity, np.pi / 2)
    far = 2 * rules.seed_distance
    lined = np.ones((rules.size, rules.size), bool)
    lined[far:-far, far:-far] = False
    lined = np.pad(lined, 2 * reach)  # outside is nothing, as the original's dilation has it
    middle = np.arange(max(0, far - 2 * reach), min(rules.size, rules.size - far + 2 * reach))
    places = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)  # no others can be free
    footprints, starts = [], []
    for mask in masks[:360]:
        # In the original the dash's start lies one pixel off the middle of the window that is laid on each place.
        offsets = np.argwhere(mask == 255) - radius + 1
        offsets = offsets[(np.abs(offsets) <= reach).all(1)]
        if not all((offsets * corner >= 0).all(1).any() for corner in ((1, 1), (1, -1), (-1, 1), (-1, -1))):
            footprints.append(offsets[:0])  # laid on a corner, it misses the picture: see the module's text
            starts.append(places[:0])
            continue
        footprints.append(offsets)
        under = places[:, None] + offsets + 2 * reach
        starts.append(places[~lined[under[..., 0], under[..., 1]].any(1)])
    return _Stamps(
        rules,
        margin,
        max(radius + margin, rules.length + 2 * margin + 1),
        angles,
        drawn,
        _prints(lines),
        _prints(masks),
        _prints([_dilate(np.pad(mask, margin), _disc(margin)) for mask in masks]),
        circle,
        (np.maximum(np.cos(turn), 0) ** 2).astype(np.float32),
        footprints,
        starts,
    )


def _disc(radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= radius**2


def _dilate(picture: np.ndarray, structure: np.ndarray) -> np.ndarray:
    """The largest value under the structure, laid on each pixel."""
    half = len(structure) // 2
    padded = np.pad(picture, half)
    height, width = picture.shape
    out = np.zeros_like(picture)
    for y, x in np.argwhere(structure):
        np.maximum(out, padded[y : y + height, x : x + width], out=out)
    return out


@dataclass
class _Dash:
    """One dash of each of some pictures: its stamp, the point from which it is drawn, where the curve goes on."""

    stamp: np.ndarray  # [n]
    place: np.ndarray  # [n, 2]
    pivot: np.ndarray  # [n, 2]

    def __getitem__(self, rows: np.ndarray) -> _Dash:
        return _Dash(self.stamp[rows], self.place[rows], self.pivot[rows])


@dataclass
class _Dashes:
    """`stamp` `[n, curves, 14]` (-1: none) and `place` `[n, curves, 14, 2]`."""

    stamp: np.ndarray
    place: np.ndarray

    @classmethod
    def none(cls, count: int, curves: int) -> _Dashes:
        return cls(np.full((count, curves, CONTOUR), -1), np.zeros((count, curves, CONTOUR, 2), np.int64))


class _Growth:
    """Curves of many pictures side by side.

    `occupied` `[n, width * width]` uint8 holds the surroundings of the dashes, with a rim around each picture; `near`
    holds `occupied` widened by the margin. Widening and taking the larger of two pictures can be done in either order,
    so it's enough to widen each stamp once.
    """

    def __init__(self, stamps: _Stamps, rng: np.random.Generator):
        self.stamps, self.rules, self.rng = stamps, stamps.rules, rng
        self.width = self.rules.size + 2 * stamps.rim
        stride = np.array([self.width, 1])
        self.circle = stamps.circle @ stride
        self.lines, self.masks, self.wider = (p.at @ stride for p in (stamps.lines, stamps.masks, stamps.wider))
        self.footprints = [offsets @ stride for offsets in stamps.footprints]
        longest = max(map(len, self.footprints))
        # Padded with repetitions of a direction's own pixels, so that all directions are looked up at once.
        self.footprint = np.stack([np.resize(offsets, longest) for offsets in self.footprints])
        self.can_start = np.array([len(offsets) > 0 for offsets in self.footprints])
        inside = np.ones((self.rules.size, self.rules.size), bool)
        self.inside = np.pad(inside, stamps.rim).ravel()
        border = np.full(inside.shape, 255, np.uint8)
        border[1:-1, 1:-1] = 0
        self.border = np.pad(border, stamps.rim).ravel()
        self.near_border = np.pad(_dilate(border, _disc(stamps.margin)), stamps.rim).ravel()
        self._clear(0)

    def _clear(self, count: int) -> None:
        self.occupied = np.repeat(self.border[None], count, 0)
        self.near = np.repeat(self.near_border[None], count, 0)

    def _index(self, place: np.ndarray) -> np.ndarray:
        return (place[..., 0] + self.stamps.rim) * self.width + place[..., 1] + self.stamps.rim

    def _within(self, place: np.ndarray) -> np.ndarray:
        return np.all((place >= 0) & (place < self.rules.size), axis=-1)

    def pictures(self, count: int, distractors: int) -> _Dashes:
        """Dashes of `count` pictures."""
        dashes = _Dashes.none(count, 2 + distractors)
        occupied, near = (np.empty((count, self.width**2), np.uint8) for _ in range(2))
        attempts = max(64, 2**23 // self.width**2)  # 16 MB of surroundings
        done = 0
        while done < count:
            rows, two = self._two_curves(attempts)
            rows = rows[: count - done]
            new = slice(done, done + len(rows))
            dashes.stamp[new, :2], dashes.place[new, :2] = two.stamp[rows], two.place[rows]
            occupied[new], near[new] = self.occupied[rows], self.near[rows]
            done += len(rows)
        self.occupied, self.near = occupied, near
        for i in range(distractors):
            pending = np.arange(count)
            for _ in range(DISTRACTOR_TRIALS):
                pending = self._distractor(pending, dashes, 2 + i)
                if len(pending) == 0:
                    break
        return dashes

    def _two_curves(self, attempts: int) -> tuple[np.ndarray, _Dashes]:
        """About `attempts` tries, each in a picture of its own: which gave two whole curves, and the dashes of all."""
        draws = attempts * 360 // max(1, self.can_start.sum())  # most directions may be none to start in
        first, good = self._seeds(draws, self._places_within)
        second, also = self._seeds(draws, lambda angle: self._places_beside(first.place))
        begun = np.flatnonzero(good & also)
        last = [first[begun], second[begun]]
        rows = np.arange(len(begun))
        dashes = _Dashes.none(len(rows), 2)
        self._clear(len(rows))
        for i in range(CONTOUR):
            for curve in range(2):
                if i > 0:
                    dash, alive = self._extend(rows, last[curve])
                    rows = rows[alive]
                    last = [dash if other == curve else last[other][alive] for other in range(2)]
                dashes.stamp[rows, curve, i], dashes.place[rows, curve, i] = last[curve].stamp, last[curve].place
        self._occupy(rows, last[1])  # and not the first curve's last dash: see the module's text
        return rows, dashes

    def _places_within(self, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array([len(places) for places in self.stamps.starts])
        every = np.concatenate(self.stamps.starts)
        pick = (self.rng.random(len(angle)) * counts[angle]).astype(int)
        return every[np.minimum((np.cumsum(counts) - counts)[angle] + pick, len(every) - 1)], counts[angle] > 0

    def _places_beside(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        around = self.rng.integers(0, 360, len(place)) * np.pi / 180
        step = self.rules.seed_distance * np.stack((np.sin(around), np.cos(around)), -1)
        return np.round(place + step).astype(np.int64), np.ones(len(place), bool)

    def _seeds(
        self, count: int, places: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[_Dash, np.ndarray]:
        """First dashes. `places(angle)` gives `[count, 2]` places and whether there are any.

        A dash that would leave the picture is drawn again, twice; where there is no place, the attempt is over.
        """
        dash = _Dash(*(np.zeros(shape, np.int64) for shape in (count, (count, 2), (count, 2))))
        good, over = np.zeros(count, bool), np.zeros(count, bool)
        for _ in range(DASH_TRIALS):
            pending = ~good & ~over
            if not pending.any():
                break
            angle = self.rng.integers(0, 360, count)
            place, found = places(angle)
            over |= pending & ~found
            radians = self.stamps.angles[angle]
            head = _translate(place, radians, self.rules.length)
            pivot = _translate(head, _flip(radians), self.rules.length + self.stamps.margin)
            fits = pending & found & self._within(head) & self._within(pivot)
            dash.stamp[fits], dash.place[fits], dash.pivot[fits] = angle[fits], place[fits], pivot[fits]
            good |= fits
        return dash, good

    def _extend(self, rows: np.ndarray, last: _Dash) -> tuple[_Dash, np.ndarray]:
        """The next dash of a curve, and in which of `rows` there is one; `last` is then occupied in these."""
        stamps = self.stamps
        pivot = _translate(last.pivot, stamps.angles[last.stamp], self.rules.length + 2 * stamps.margin)
        ends = pivot[:, None] + stamps.circle
        index = np.where(self._within(ends), self._index(ends), 0)  # 0: a corner of the rim, never within
        base = (rows * self.width**2)[:, None]
        near = self.near.reshape(-1).take(base + index)
        weight = (255 - near) * stamps.weights[last.stamp]
        weight[index == 0] = 0
        cumulative = np.cumsum(weight, 1)
        total = cumulative[:, -1]
        alive = total >= 255e-4
        chosen = np.zeros(len(rows), np.int64)
        found = np.zeros(len(rows), bool)
        for _ in range(DASH_TRIALS):
            trying = np.flatnonzero(alive & ~found)
            if len(trying) == 0:
                break
            lot = self.rng.random(len(trying)) * total[trying]
            pick = np.minimum((cumulative[trying] <= lot[:, None]).sum(1), len(stamps.circle) - 1)
            where = index[trying, pick][:, None] + self.masks[360 + pick]
            there = self.occupied.reshape(-1).take(base[trying] + where)
            sums = there.astype(np.int16) + stamps.masks.values[360 + pick]
            clear = ((sums < OVERLAP) | ~self.inside[where]).all(1)
            chosen[trying[clear]] = pick[clear]
            found[trying[clear]] = True
        self._occupy(rows[found], last[found])
        return _Dash(360 + chosen[found], ends[found, chosen[found]], pivot[found]), found

    def _occupy(self, rows: np.ndarray, dash: _Dash) -> None:
        # What falls on the rim stays there and is never looked at.
        index = (rows * self.width**2 + self._index(dash.place))[:, None]
        for pictures, offsets, prints in (
            (self.occupied.reshape(-1), self.masks, self.stamps.masks),
            (self.near.reshape(-1), self.wider, self.stamps.wider),
        ):
            at = index + offsets[dash.stamp]
            pictures[at] = np.maximum(pictures.take(at), prints.values[dash.stamp])

    def _distractor(self, rows: np.ndarray, dashes: _Dashes, curve: int) -> np.ndarray:
        """Try a distractor in each of `rows`, as the given curve of `dashes`. Returns where it failed."""
        # The attempt works on copies: what it occupies counts only if all its dashes find a place.
        whole = self.occupied, self.near
        self.occupied, self.near = self.occupied[rows], self.near[rows]
        free = (self.occupied[:, self.inside] <= OCCUPIED).mean(1)
        last, good = self._seeds(len(rows), self._free_places)
        alive = np.flatnonzero(good & (free >= AVAILABLE))
        last = last[alive]
        tried = _Dashes.none(len(rows), 1)
        for i in range(DISTRACTOR):
            if i > 0:
                last, found = self._extend(alive, last)
                alive = alive[found]
            tried.stamp[alive, 0, i], tried.place[alive, 0, i] = last.stamp, last.place
        self._occupy(alive, last)
        done = rows[alive]
        whole[0][done], whole[1][done] = self.occupied[alive], self.near[alive]
        self.occupied, self.near = whole
        dashes.stamp[done, curve], dashes.place[done, curve] = tried.stamp[alive, 0], tried.place[alive, 0]
        return np.delete(rows, alive)

    def _free_places(self, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A place for each picture, uniform among those where a dash in its direction has free surroundings."""
        size = self.rules.size
        place = np.zeros((len(angle), 2), np.int64)
        found = np.zeros(len(angle), bool)
        for _ in range(8):  # eight draws of eight places nearly always find one
            left = np.flatnonzero(~found & self.can_start[angle])
            if len(left) == 0:
                return place, found
            tries = self.rng.integers(0, size, (len(left), 8, 2))
            where = self._index(tries)[:, :, None] + self.footprint[angle[left]][:, None]
            free = self.occupied[left[:, None, None], where].max(-1) <= OCCUPIED
            some = free.any(1)
            place[left[some]] = tries[some, free[some].argmax(1)]
            found[left[some]] = True
        every = np.argwhere(np.ones((size, size), bool))
        for row in np.flatnonzero(~found & self.can_start[angle]):
            where = self._index(every)[:, None] + self.footprints[angle[row]]
            places = every[self.occupied[row][where].max(1) <= OCCUPIED]
            if len(places):
                place[row], found[row] = places[self.rng.integers(len(places))], True
        return place, found

    def render(self, dashes: _Dashes, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pictures `[n, size, size]` uint8 and the places `[n, 2, 2]` of their dots."""
        count, curves, _ = dashes.stamp.shape
        canvas = np.zeros((count, self.width**2), np.float32)
        for curve in range(curves):
            contrast = self.rules.contour_contrast if curve < 2 else self.rules.distractor_contrast
            for i in range(CONTOUR if curve < 2 else DISTRACTOR):
                rows = np.flatnonzero(dashes.stamp[:, curve, i] >= 0)
                stamp = dashes.stamp[rows, curve, i]
                at = (rows[:, None], self._index(dashes.place[rows, curve, i])[:, None] + self.lines[stamp])
                lines = self.stamps.lines.values[stamp] / np.float32(255) * np.float32(contrast)
                canvas[at] = np.maximum(canvas[at], lines)
        size, rim = self.rules.size, self.stamps.rim
        pictures = canvas.reshape(count, self.width, self.width)[:, rim : rim + size, rim : rim + size]
        first = self.rng.integers(0, 2, count)
        rows = np.arange(count)
        dots = np.stack(
            (dashes.place[rows, first, 0], dashes.place[rows, np.where(labels == 1, first, 1 - first), CONTOUR - 1]), 1
        )
        images = np.empty((count, size, size), np.uint8)
        for row in range(count):
            picture = pictures[row].astype(np.float64)  # as the original: 0.9 in float32 times 255 is below 229.5
            for y, x in dots[row]:
                picture = np.maximum(picture, self._dot(int(y), int(x)) / 255)
            low, high = picture.min(), picture.max()
            images[row] = (picture - low) * (255 / (high - low)) + 0.5
        return images, dots

    def _dot(self, y: int, x: int) -> np.ndarray:
        size = self.rules.size
        rows, columns = np.ogrid[: size * SCALE, : size * SCALE]
        disc = (rows - y * SCALE) ** 2 + (columns - x * SCALE) ** 2 <= (self.rules.marker_radius * SCALE) ** 2
        return _shrink(disc.astype(np.uint8) * 255, size)

    def ends(self, dashes: _Dashes) -> np.ndarray:
        """The curves of `Pictures`."""
        other = _translate(dashes.place, self.stamps.drawn[dashes.stamp], self.rules.length)
        first = dashes.stamp[..., None] < 360
        ends = np.stack((np.where(first, dashes.place, other), np.where(first, other, dashes.place)), -2)
        return np.where(dashes.stamp[..., None, None] >= 0, ends, -1).astype(np.int16)
