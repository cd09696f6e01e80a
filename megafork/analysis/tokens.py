"""Which tokens have the highest and the lowest mean entropy (arXiv 2506.01939, figure 2b, 2c)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megafork.analysis.columns import Columns
from megafork.analysis.glyphs import Font, token_label
from megafork.analysis.means import ClusteredMeans
from megafork.analysis.output import BLUE, GREY, ORANGE, figure, write_table
from megafork.errors import UserError

_NUM_BARS = 20
_LONGEST = 24


@dataclass(frozen=True)
class TokenStatistics:
    """Of one token id."""

    id: int
    text: str
    label: str
    """legible and unique: blanks and line ends are shown, an id stands for what has no text"""
    count: int
    responses: int
    mean: float
    """nats"""
    standard_error: float


@dataclass(frozen=True)
class RankedTokens:
    """Those that occur min_count times, in min_responses responses, by mean entropy, highest first;
    of equal ones the lower id first."""

    num_tokens: int
    num_ids: int
    """ids that occur at all"""
    min_count: int
    min_responses: int
    ranked: list[TokenStatistics]

    def highest(self, count: int) -> list[TokenStatistics]:
        """No token is both among the highest and among the lowest."""
        return self.ranked[: min(count, -(-len(self.ranked) // 2))]

    @property
    def condition(self) -> str:
        """Of being ranked, as a title says it."""
        return f"that occur at least {self.min_count} times, in {self.min_responses} responses"

    def lowest(self, count: int) -> list[TokenStatistics]:
        """The lowest first."""
        return self.ranked[::-1][: min(count, len(self.ranked) // 2)]


def rank_tokens(
    columns: Columns,
    vocab_size: int,
    name: Callable[[int], str],
    min_count: int,
    min_responses: int,
) -> RankedTokens:
    """name: one token as text. Raises UserError when no token occurs often enough.

    What a single response repeats may lead by mean entropy and says nothing of the model.
    """
    means = ClusteredMeans(vocab_size)
    for block in columns.blocks():
        means.add(block.entropy_T, block.id_T.astype(numpy.int64), block.row_T)
    often, widely = means.count >= min_count, means.num_responses >= min_responses
    frequent = (often & widely).nonzero()[0]
    if not len(frequent):
        raise UserError(
            f"--min-count={min_count} and --min-responses={min_responses}: no token occurs so "
            f"often in {columns.path} (the most frequent {means.count.max()} times, the most "
            f"widespread in {means.num_responses.max()} responses): lower them"
        )
    mean, error = means.mean, means.standard_error
    ids = frequent[numpy.argsort(-mean[frequent], kind="stable")].tolist()
    names = [name(i) for i in ids]
    ranked = [
        TokenStatistics(
            id=i,
            text=text,
            label=label,
            count=int(means.count[i]),
            responses=int(means.num_responses[i]),
            mean=float(mean[i]),
            standard_error=float(error[i]),
        )
        for i, text, label in zip(ids, names, _unique_labels(ids, names), strict=True)
    ]
    num_ids = int((means.count > 0).sum())
    return RankedTokens(columns.num_tokens, num_ids, min_count, min_responses, ranked)


def _unique_labels(ids: Sequence[int], names: Sequence[str]) -> list[str]:
    labels = [token_label(i, name, _LONGEST) for i, name in zip(ids, names, strict=True)]
    times: dict[str, int] = {}
    for label in labels:
        times[label] = times.get(label, 0) + 1
    return [
        label if times[label] == 1 else f"{label} #{i}"
        for i, label in zip(ids, labels, strict=True)
    ]


def write_tokens(
    found: RankedTokens, source: str, folder: Path, name: str, *, num_words: int, font: Font
) -> None:
    """NAME.csv and NAME.json (all ranked tokens), NAME.png (bars), NAME_cloud.png."""
    highest, lowest = found.highest(num_words), found.lowest(num_words)
    rows = [
        {
            "rank": rank,
            "id": token.id,
            "token": token.label,
            "count": token.count,
            "responses": token.responses,
            "mean_entropy_nats": token.mean,
            "standard_error_nats": token.standard_error,
        }
        for rank, token in enumerate(found.ranked, 1)
    ]
    about = {
        "source": source,
        "tokens": found.num_tokens,
        "ids_that_occur": found.num_ids,
        "ids_ranked": len(found.ranked),
        "min_count": found.min_count,
        "min_responses": found.min_responses,
        "standard_errors": "over responses; empty with fewer than two",
        "highest": [token.text for token in highest],
        "lowest": [token.text for token in lowest],
        "font": font.path,
        "not_drawn": [t.label for t in highest + lowest if not font.can_draw(t.label)],
    }
    write_table(folder, name, rows, about)
    _draw_bars(found, source, folder / f"{name}.png", font)
    _draw_cloud(highest, lowest, found.condition, source, folder / f"{name}_cloud.png", font)


def _draw_bars(found: RankedTokens, source: str, path: Path, font: Font) -> None:
    """Bars for the highest; points on a logarithmic axis for the lowest, which differ by powers of
    ten (none is shown at 0 or below)."""
    from matplotlib.ticker import LogLocator, NullFormatter

    highest, lowest = found.highest(_NUM_BARS), found.lowest(_NUM_BARS)
    lowest = [token for token in lowest[::-1] if token.mean > 0]
    rows = len(highest) + max(len(lowest), 1)
    with figure(path, (len(highest), max(len(lowest), 1)), height=1.9 + 0.2 * rows) as (top, below):
        top.barh(range(len(highest)), [t.mean for t in highest], color=ORANGE)
        for one, tokens, colour in ((top, highest, GREY), (below, lowest, BLUE)):
            one.errorbar(
                [t.mean for t in tokens],
                range(len(tokens)),
                xerr=_error_bars(tokens),
                fmt="none" if one is top else "o",
                color=BLUE,
                ecolor=colour,
                markersize=4,
            )
            one.set_yticks(
                range(len(tokens)), [f"{font.drawable(t.label)}  ({t.count:,})" for t in tokens]
            )
            for label in one.get_yticklabels():
                label.set_parse_math(False)  # a token may hold dollar signs
                label.set_fontproperties(font.properties(8))
            one.set_ylim(max(len(tokens), 1) - 0.4, -0.6)
        top.set_xlim(left=0.0)
        top.set_title(
            f"{source}: tokens (count) of highest and lowest mean entropy,\namong "
            f"{len(found.ranked)} {found.condition}",
            fontsize="medium",
        )
        if lowest:
            below.set_xscale("log")
            wide = max(t.mean for t in lowest) > 100 * min(t.mean for t in lowest)
            below.xaxis.set_major_locator(
                LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8)
            )
            below.xaxis.set_major_formatter("{x:.0e}")
            below.xaxis.set_minor_formatter(NullFormatter())
            below.grid(axis="x", alpha=0.3)
        below.set_xlabel("mean entropy where the token was sampled (nats), with standard error")


def _error_bars(tokens: Sequence[TokenStatistics]) -> numpy.ndarray:
    """[below, above]; below it ends within the logarithmic axis, none where it is unknown"""
    mean = numpy.array([t.mean for t in tokens])
    error = numpy.nan_to_num([t.standard_error for t in tokens])
    return numpy.stack([numpy.minimum(error, 0.9 * mean.clip(min=0.0)), error])


def _draw_cloud(
    highest: Sequence[TokenStatistics],
    lowest: Sequence[TokenStatistics],
    condition: str,
    source: str,
    path: Path,
    font: Font,
) -> None:
    """Size: the mean entropy among the highest, the rank among the lowest (their entropies may
    differ by powers of ten)."""
    panels = (
        ("highest mean entropy (size: mean entropy)", "autumn", _by_mean(highest, font)),
        ("lowest mean entropy (size: rank, the lowest largest)", "winter", _by_rank(lowest, font)),
    )
    with figure(path, (1, 1), height=6.4) as axes:
        for one, (title, colours, sizes) in zip(axes, panels, strict=True):
            one.set_axis_off()
            one.set_title(title, fontsize="medium")
            if sizes:
                cloud = _cloud(sizes, font, colours)
                one.imshow(cloud.to_array(), interpolation="bilinear")
                if (drawn := len(cloud.layout_)) < len(sizes):
                    one.set_title(f"{title}; {drawn} of {len(sizes)} found room", fontsize="medium")
            else:
                one.text(0.5, 0.5, "none that the font can draw", ha="center")
        missing = sum(not font.can_draw(t.label) for t in [*highest, *lowest])
        left_out = f"; {missing} that the font lacks are left out" if missing else ""
        axes[0].figure.suptitle(f"{source}: tokens {condition}{left_out}", fontsize="medium")


def _by_mean(tokens: Sequence[TokenStatistics], font: Font) -> dict[str, float]:
    # wordcloud takes no word of size 0
    return {t.label: max(t.mean, 1e-9) for t in tokens if font.can_draw(t.label)}


def _by_rank(tokens: Sequence[TokenStatistics], font: Font) -> dict[str, float]:
    drawn = [t.label for t in tokens if font.can_draw(t.label)]
    return {label: 1 - 0.8 * i / len(drawn) for i, label in enumerate(drawn)}


def _cloud(sizes: dict[str, float], font: Font, colours: str) -> Any:
    from wordcloud import WordCloud

    cloud = WordCloud(
        width=1000,
        height=400,
        font_path=font.path,
        background_color="white",
        # The pale end of a colour map cannot be read on white.
        color_func=_Shades(colours),
        prefer_horizontal=1.0,
        relative_scaling=0.7,
        min_font_size=8,
        random_state=0,
    )
    return cloud.generate_from_frequencies(sizes)


class _Shades:
    """The darker half of a colour map, at random but seeded."""

    def __init__(self, name: str) -> None:
        from matplotlib import colormaps

        self._colours = colormaps[name]

    def __call__(self, word, random_state=None, **_: object) -> tuple[int, int, int]:  # type: ignore[no-untyped-def]
        red, green, blue, _alpha = self._colours(0.5 * random_state.random())
        return int(200 * red), int(200 * green), int(200 * blue)
