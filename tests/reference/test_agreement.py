"""Agreement against textbook tables, a definition written out in loops, and people's own labels."""

from __future__ import annotations

import json
import math
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest

from rung.scoring.agreement import Ratings, cohen_kappa, fleiss_kappa, krippendorff_alpha, percent_agreement

FLEISS = (
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
)  # fmt: skip
"""Fourteen raters, ten items, five labels: the worked example of Fleiss' kappa on Wikipedia, 0.210."""

KRIPPENDORFF = (
    (1, 1, None, 1), (2, 2, 3, 2), (3, 3, 3, 3), (3, 3, 3, 3), (2, 2, 2, 2), (1, 2, 3, 4),
    (4, 4, 4, 4), (1, 1, 2, 1), (2, 2, 2, 2), (None, 5, 5, 5), (None, None, 1, 1), (None, 3, None, None),
)  # fmt: skip
"""Four observers, twelve units, missing data (Krippendorff 2011, part C)."""


def of_table(table: list[list[int]]) -> tuple[list[int], list[int]]:
    pairs = [(i, k) for i, row in enumerate(table) for k, count in enumerate(row) for _ in range(count)]
    return [i for i, _ in pairs], [k for _, k in pairs]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[20, 5], [10, 15]], 0.4),  # Wikipedia, Cohen's kappa, first example
        ([[45, 15], [25, 15]], 0.1304),  # same percentage agreement, other kappas: the second example
        ([[25, 35], [5, 35]], 0.2593),
        ([[88, 14, 18], [10, 40, 10], [2, 6, 12]], 0.492),  # Cohen 1968, table 1, as counts of 200 (Fleiss et al. 1969)
    ],
)
def test_cohen_equals_published_tables(table: list[list[int]], expected: float) -> None:
    assert cohen_kappa(*of_table(table)).mean == pytest.approx(expected, abs=5e-4)


def test_cohens_interval_is_near_the_large_sample_error_of_fleiss_cohen_and_everitt() -> None:
    first, second = of_table([[88, 14, 18], [10, 40, 10], [2, 6, 12]])
    found = cohen_kappa(first, second)
    p = np.array([[88, 14, 18], [10, 40, 10], [2, 6, 12]]) / 200
    rows, columns = p.sum(1), p.sum(0)
    agreed, chance = np.trace(p), rows @ columns
    # Fleiss, Cohen and Everitt 1969, eq. 13 of the non-null variance.
    a = (np.diag(p) * ((1 - chance) - (rows + columns) * (1 - agreed)) ** 2).sum()
    crossed = (1 - agreed) ** 2 * sum(p[i, k] * (columns[i] + rows[k]) ** 2 for i, k in permutations(range(3), 2))
    variance = (a + crossed - (agreed * chance - 2 * chance + agreed) ** 2) / (200 * (1 - chance) ** 4)
    assert (found.high - found.low) / 2 == pytest.approx(1.97 * math.sqrt(variance), rel=0.05)


def test_fleiss_equals_the_worked_example() -> None:
    ratings = [[label for label, count in enumerate(row) for _ in range(count)] for row in FLEISS]
    found = fleiss_kappa(ratings)
    assert found.mean == pytest.approx(0.210, abs=5e-4)
    assert percent_agreement(ratings).mean == pytest.approx(0.378, abs=5e-4)  # the example's P-bar
    assert found.low < found.mean < found.high and (found.examples, found.clusters) == (10, 10)


def test_krippendorff_equals_the_worked_example() -> None:
    found = krippendorff_alpha(KRIPPENDORFF)
    assert found.mean == pytest.approx(0.743, abs=5e-4)
    assert found.examples == 11  # the unit that one observer rated tells nothing


def alpha_in_loops(ratings: Ratings) -> float:
    """1 - D_o / D_e from the definition: pairs within units against pairs of all pairable values."""
    units = [[x for x in unit if x is not None] for unit in ratings]
    units = [unit for unit in units if len(unit) > 1]
    values = [x for unit in units for x in unit]
    within = sum(sum(a != b for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units) / len(values)
    across = sum(a != b for a, b in permutations(values, 2)) / (len(values) * (len(values) - 1))
    return 1 - within / across


@pytest.mark.parametrize("seed", range(4))
def test_alpha_equals_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ratings = [[None if rng.random() < 0.2 else int(rng.integers(3)) for _ in range(4)] for _ in range(25)]
    assert krippendorff_alpha(ratings).mean == pytest.approx(alpha_in_loops(ratings), rel=1e-12)


def test_clusters_widen_the_interval_and_copies_change_nothing() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(3, size=90).tolist()
    second = [a if rng.random() < 0.7 else int(rng.integers(3)) for a in first]
    alone = cohen_kappa(first, second)
    ids = [i for i in range(90) for _ in range(4)]
    copied = cohen_kappa(np.repeat(first, 4).tolist(), np.repeat(second, 4).tolist(), ids)
    assert copied.mean == pytest.approx(alone.mean) and copied.clusters == 90
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), abs=0.02)


def test_full_agreement_is_never_certain_and_one_label_says_nothing() -> None:
    same = ["a", "b"] * 10
    found = cohen_kappa(same, same)
    assert (found.mean, found.high, found.method) == (1.0, 1.0, "clopper-pearson, chance as it was")
    # Clopper-Pearson's 20 of 20, 0.025^(1/20) = 0.8316, beyond the chance of 0.5
    assert found.low == pytest.approx((0.8316 - 0.5) / 0.5, abs=1e-3)
    assert fleiss_kappa([[x, x] for x in same]).low == pytest.approx(found.low)
    nothing = krippendorff_alpha([["a", "a"]] * 5)
    assert math.isnan(nothing.mean) and nothing.to_json()["mean"] is None and nothing.method.startswith("undefined")
    assert percent_agreement([["a", "a"]] * 5).mean == 1.0


def test_who_says_the_same_of_everything_is_not_known_for_certain_to_agree_by_chance() -> None:
    found = cohen_kappa(["tie"] * 60, ["first"] * 30 + ["second"] * 20 + ["tie"] * 10)
    assert found.mean == 0.0 and found.low < -0.05 and found.high > 0.05
    assert found.method == "cluster bootstrap, chance as it was"


def test_what_was_left_out_is_left_out_and_wrong_shapes_are_refused() -> None:
    assert cohen_kappa([1, None, 0, 1], [1, 1, 0, 0], list("aabb")).examples == 3
    with pytest.raises(ValueError, match="same items"):
        cohen_kappa([1], [1, 0])
    with pytest.raises(ValueError, match="equally many"):
        fleiss_kappa([[1, 1, None], [1, 0, 1]])
    with pytest.raises(ValueError, match="rated by two"):
        krippendorff_alpha([[1, None], [None, 0]])
    with pytest.raises(ValueError, match="one list an item"):
        percent_agreement([[1, 1], [1]])
    with pytest.raises(ValueError, match="cluster ids"):
        percent_agreement([[1, 1], [1, 0]], ["a"])


def test_real_pandalm_annotators(real_data: Path) -> None:
    rows = json.loads((real_data / "pandalm" / "testset-v1.json").read_text())
    raters = [[row[f"annotator{k}"] for row in rows] for k in (1, 2, 3)]
    clusters = [f"{row['instruction']}\n{row['input']}" for row in rows]
    found = [cohen_kappa(a, b, clusters) for a, b in combinations(raters, 2)]
    assert [round(kappa.mean, 3) for kappa in found] == [0.852, 0.879, 0.862]
    assert all(kappa.low < kappa.mean < kappa.high and kappa.clusters == 170 for kappa in found)
    ratings = list(zip(*raters, strict=True))
    assert round(fleiss_kappa(ratings, clusters).mean, 3) == 0.864
    assert krippendorff_alpha(ratings, clusters).mean == pytest.approx(0.864, abs=1e-3)


def test_few_clusters_and_few_disagreements_do_not_narrow_an_interval() -> None:
    """One disagreement in 40 lowers the bound of full agreement; four clusters get Student's t, not percentiles."""
    same = ["a", "b"] * 20
    almost = [*same[:-1], "a"]
    assert cohen_kappa(same, almost).low < cohen_kappa(same, same).low
    assert percent_agreement(list(zip(same, almost, strict=True))).low == pytest.approx(0.8684, abs=5e-5)  # 39 of 40
    rng = np.random.default_rng(0)
    second = [a if rng.random() < 0.7 else "b" for a in same]
    few, many = cohen_kappa(same, second, [i // 10 for i in range(40)]), cohen_kappa(same, second)
    assert few.method == "t on clusters" and few.clusters == 4
    assert few.high - few.low > many.high - many.low


def scale_agreement(pairs: list[tuple[float, float]], values: list[tuple[float, float]]) -> float:
    """1 - D_o / D_e from the definition: mean squared distance of pairs over that of pairs by chance."""
    observed = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    return 1 - observed / (sum((a - b) ** 2 for a, b in values) / len(values))


def test_kappa_on_a_scale_weights_by_squared_distance() -> None:
    """Cohen 1968: chance pairs every rating of the first rater with every one of the second."""
    rng = np.random.default_rng(4)
    first = [int(x) for x in rng.integers(1, 6, size=60)]
    second = [min(5, max(1, x + int(d))) for x, d in zip(first, rng.integers(-2, 3, size=60), strict=True)]
    expected = scale_agreement(list(zip(first, second, strict=True)), [(a, b) for a in first for b in second])
    found = cohen_kappa(first, second, is_scale=True)
    assert found.mean == pytest.approx(expected, abs=1e-12)
    assert found.low < expected < found.high
    assert abs(found.mean - cohen_kappa(first, second).mean) > 0.1  # without an order it is another number


def test_alpha_on_a_scale() -> None:
    """Krippendorff 2011, part D: chance pairs every two of all pairable values; ratings may be missing."""
    rng = np.random.default_rng(5)
    ratings: list[list[int | None]] = []
    for _ in range(40):
        base = int(rng.integers(1, 6))
        item = [min(5, max(1, base + int(rng.integers(-1, 2)))) for _ in range(3)]
        ratings.append([None if rng.random() < 0.2 else value for value in item])
    units = [[value for value in item if value is not None] for item in ratings]
    units = [values for values in units if len(values) > 1]
    # a unit of m ratings counts m of them, spread over its m (m - 1) ordered pairs
    n = sum(map(len, units))
    observed = sum(
        (a - b) ** 2 / (len(v) - 1) for v in units for i, a in enumerate(v) for k, b in enumerate(v) if i != k
    )
    everything = [value for values in units for value in values]
    chance = sum((a - b) ** 2 for i, a in enumerate(everything) for k, b in enumerate(everything) if i != k) / (n - 1)
    found = krippendorff_alpha(ratings, is_scale=True)
    assert found.mean == pytest.approx(1 - observed / chance, abs=1e-12)
    shifted = [[None if value is None else 10 - 2 * value for value in item] for item in ratings]
    assert krippendorff_alpha(shifted, is_scale=True).mean == pytest.approx(found.mean, abs=1e-12)


def test_alpha_on_a_scale_equals_the_worked_example() -> None:
    """Krippendorff 2011: the data of part C with the interval metric."""
    assert krippendorff_alpha(KRIPPENDORFF, is_scale=True).mean == pytest.approx(0.849, abs=5e-4)


def test_a_number_that_one_rater_gave_does_not_stretch_the_scale() -> None:
    """Its item is ignored; the scale of the others decides how wide the interval is."""
    first, second = [1, 2, 3, 4, 5] * 8, [1, 3, 3, 4, 4] * 8
    for lone, expected in (
        (
            krippendorff_alpha([*KRIPPENDORFF, (100, None, None, None)], is_scale=True),
            krippendorff_alpha(KRIPPENDORFF, is_scale=True),
        ),
        (cohen_kappa([*first, 100], [*second, None], is_scale=True), cohen_kappa(first, second, is_scale=True)),
    ):
        assert (lone.mean, lone.low, lone.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("label", ["1", math.nan, math.inf])
def test_labels_on_a_scale_are_numbers(label: str | float) -> None:
    with pytest.raises(ValueError, match="labels on a scale are numbers"):
        cohen_kappa([1, label], [2, 1], is_scale=True)
    with pytest.raises(ValueError, match="labels on a scale are numbers"):
        krippendorff_alpha([[1, 2], [label, 1]], is_scale=True)
    with pytest.raises(ValueError, match="rated by two"):
        krippendorff_alpha([[1, None], [None, 2]], is_scale=True)
