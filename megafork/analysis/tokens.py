"""The tokens of highest and of lowest mean entropy (arXiv 2506.01939, figure 2b, 2c)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megafork.analysis.glyphs import Font, token_label
from megafork.analysis.output import BLUE, GREY, ORANGE, Row, figure, rows_of, write_table
from megafork.analysis.scored import Scored
from megafork.analysis.statistics import clustered_means
from megafork.errors import UserError

_NUM_BARS = 20
_LONGEST = 24


@dataclass(frozen=True)
class RankedTokens:
    """The tokens that occur often enough, by mean entropy, highest first; of equal ones the lower
    id first."""

    rows: list[Row]
    """rows of the table; `token` is legible and unique: blanks and line ends are shown, an id
    stands for what has no text"""
    texts: dict[int, str]
    """each id as the tokenizer has it"""
    about: Row

    @property
    def condition(self) -> str:
        """The condition for a token to be ranked, as a title says it."""
        count, responses = self.about["min_count"], self.about["min_responses"]
        return f"that occur at least {count} times, in {responses} responses"

    def highest(self, count: int) -> list[Row]:
        """The highest first. No token is both among the highest and among the lowest."""
        return self.rows[: min(count, -(-len(self.rows) // 2))]

    def lowest(self, count: int) -> list[Row]:
        """The lowest first."""
        return self.rows[::-1][: min(count, len(self.rows) // 2)]


def rank_tokens(
    scored: Scored,
    vocab_size: int,
    name: Callable[[int], str],
    min_count: int,
    min_responses: int,
) -> RankedTokens:
    """Rank the ids that occur min_count times, in min_responses responses, by mean entropy.

    A token that a single response repeats may lead by mean entropy and says nothing of the model.
    scored: with its ids. name: one token as text. Raises UserError when no token occurs often
    enough.
    """
    assert scored.id_T is not None
    means = clustered_means(scored.entropy_T, scored.id_T, scored.response_T(), vocab_size)
    frequent = ((means.count >= min_count) & (means.num_responses >= min_responses)).nonzero()[0]
    if not len(frequent):
        raise UserError(
            f"--min-count={min_count} and --min-responses={min_responses}: no token occurs so "
            f"often in {scored.path} (the most frequent {means.count.max()} times, the most "
            f"widespread in {means.num_responses.max()} responses): lower them"
        )
    id_R = frequent[numpy.argsort(-means.mean[frequent], kind="stable")]
    texts = {i: name(i) for i in id_R.tolist()}
    labels = {i: token_label(i, text, _LONGEST) for i, text in texts.items()}
    times = Counter(labels.values())
    rows = rows_of(
        rank=range(1, len(id_R) + 1),
        id=id_R,
        token=[text if times[text] == 1 else f"{text} #{i}" for i, text in labels.items()],
        count=means.count[id_R],
        responses=means.num_responses[id_R],
        mean_entropy_nats=means.mean[id_R],
        standard_error_nats=means.standard_error[id_R],
    )
    about = {
        "tokens": scored.num_tokens,
        "ids_that_occur": int((means.count > 0).sum()),
        "ids_ranked": len(rows),
        "min_count": min_count,
        "min_responses": min_responses,
        "standard_errors": "over responses; empty with fewer than two",
    }
    return RankedTokens(rows, texts, about)


def write_tokens(
    found: RankedTokens, source: str, folder: Path, name: str, *, num_words: int, font: Font
) -> None:
    """Write NAME.csv and NAME.json (all ranked tokens), NAME.png (bars) and NAME_cloud.png."""
    highest, lowest = found.highest(num_words), found.lowest(num_words)
    about = {
        "source": source,
        **found.about,
        "highest": [found.texts[row["id"]] for row in highest],
        "lowest": [found.texts[row["id"]] for row in lowest],
        "font": font.path,
        "not_drawn": [r["token"] for r in highest + lowest if not font.can_draw(r["token"])],
    }
    write_table(folder, name, found.rows, about)
    _draw_bars(found, source, folder / f"{name}.png", font)
    _draw_cloud(highest, lowest, found.condition, source, folder / f"{name}_cloud.png", font)


def _draw_bars(found: RankedTokens, source: str, path: Path, font: Font) -> None:
    """Bars for the highest; points on a logarithmic axis for the lowest, which differ by powers of
    ten (none is shown at 0 or below)."""
    from matplotlib.ticker import LogLocator, NullFormatter

    highest, lowest = found.highest(_NUM_BARS), found.lowest(_NUM_BARS)
    lowest = [token for token in lowest[::-1] if token["mean_entropy_nats"] > 0]
    rows = len(highest) + max(len(lowest), 1)
    with figure(path, (len(highest), max(len(lowest), 1)), height=1.9 + 0.2 * rows) as (top, below):
        top.barh(range(len(highest)), [t["mean_entropy_nats"] for t in highest], color=ORANGE)
        for one, tokens, colour in ((top, highest, GREY), (below, lowest, BLUE)):
            one.errorbar(
                [t["mean_entropy_nats"] for t in tokens],
                range(len(tokens)),
                xerr=_error_bars(tokens),
                fmt="none" if one is top else "o",
                color=BLUE,
                ecolor=colour,
                markersize=4,
            )
            one.set_yticks(
                range(len(tokens)),
                [f"{font.drawable(t['token'])}  ({t['count']:,})" for t in tokens],
            )
            for label in one.get_yticklabels():
                label.set_parse_math(False)  # a token may hold dollar signs
                label.set_fontproperties(font.properties(8))
            one.set_ylim(max(len(tokens), 1) - 0.4, -0.6)
        top.set_xlim(left=0.0)
        top.set_title(
            f"{source}: tokens (count) of highest and lowest mean entropy,\namong "
            f"{len(found.rows)} {found.condition}",
            fontsize="medium",
        )
        if lowest:
            below.set_xscale("log")
            means = [t["mean_entropy_nats"] for t in lowest]
            wide = max(means) > 100 * min(means)
            below.xaxis.set_major_locator(
                LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8)
            )
            below.xaxis.set_major_formatter("{x:.0e}")
            below.xaxis.set_minor_formatter(NullFormatter())
            below.grid(axis="x", alpha=0.3)
        below.set_xlabel("mean entropy where the token was sampled (nats), with standard error")


def _error_bars(tokens: Sequence[Row]) -> numpy.ndarray:
    """Length of the error bars, float64 [2, tokens]: below the mean and above it.

    Below it ends within the logarithmic axis; it is 0 where the error is unknown.
    """
    mean = numpy.array([t["mean_entropy_nats"] for t in tokens])
    error = numpy.nan_to_num([t["standard_error_nats"] for t in tokens])
    return numpy.stack([numpy.minimum(error, 0.9 * mean.clip(min=0.0)), error])


def _draw_cloud(
    highest: Sequence[Row],
    lowest: Sequence[Row],
    condition: str,
    source: str,
    path: Path,
    font: Font,
) -> None:
    """Draw both word clouds. The size is the mean entropy among the highest, the rank among the
    lowest, as their entropies may differ by powers of ten."""
    legible = [[t for t in tokens if font.can_draw(t["token"])] for tokens in (highest, lowest)]
    # wordcloud takes no word of size 0
    by_mean = {t["token"]: max(t["mean_entropy_nats"], 1e-9) for t in legible[0]}
    by_rank = {t["token"]: 1 - 0.8 * i / len(legible[1]) for i, t in enumerate(legible[1])}
    panels = (
        ("highest mean entropy (size: mean entropy)", "autumn", by_mean),
        ("lowest mean entropy (size: rank, the lowest largest)", "winter", by_rank),
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
        missing = len(highest) + len(lowest) - len(by_mean) - len(by_rank)
        left_out = f"; {missing} that the font lacks are left out" if missing else ""
        axes[0].figure.suptitle(f"{source}: tokens {condition}{left_out}", fontsize="medium")


def _cloud(sizes: dict[str, float], font: Font, colours: str) -> Any:
    from matplotlib import colormaps
    from wordcloud import WordCloud

    def shade(word: str, random_state: Any = None, **_: object) -> tuple[int, int, int]:
        """The darker half of a colour map, at random but seeded: its pale end is not legible."""
        red, green, blue, _alpha = colormaps[colours](0.5 * random_state.random())
        return int(200 * red), int(200 * green), int(200 * blue)

    cloud = WordCloud(
        width=1000,
        height=400,
        font_path=font.path,
        background_color="white",
        color_func=shade,
        prefer_horizontal=1.0,
        relative_scaling=0.7,
        min_font_size=8,
        random_state=0,
    )
    return cloud.generate_from_frequencies(sizes)
