"""The formulas that plan past what can be run: held against what small runs really send, and against known sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.ranks import end, start
from test_ranks import LIMIT_S, Ranked

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from scale_plan import MODELS, Machine, costs, llama, page, sent_sums  # noqa: E402

SHARED = {"8B": 8.0, "70B": 70.6, "405B": 405.8}


def test_parameters_are_those_that_the_models_are_named_after():
    """A group that is left out of a model, and with it of every figure."""
    found = {model.name: model.parameters / 1e9 for model in MODELS}
    assert all(found[name] == pytest.approx(size, rel=0.01) for name, size in SHARED.items()) and 900 < found["1T of experts"] < 1100


def test_flop_of_a_dense_model_are_those_of_the_design():
    """8.6 FLOP per parameter and token (DESIGN section 9): two streams forward, H and D."""
    model = llama("8B", 32, 4096, 14336, 1024)
    inside = model.active
    assert costs(model, 1, 1 << 18, Machine()).flop / (inside * (1 << 18)) == pytest.approx(8.6, rel=0.25)


def test_more_devices_are_never_slower_and_fit_better():
    """A part that is counted once per device."""
    for model in MODELS:
        found = [costs(model, ranks, 1 << 18, Machine()) for ranks in (1, 8, 16)]
        assert found[0].elapsed_s > found[1].elapsed_s > found[2].elapsed_s and found[0].device_bytes > found[1].device_bytes
    assert "405B" in page(1 << 18, Machine(), (8, 64))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_bytes_of_sums_are_those_that_ranks_send(zoo, tmp_path, size):
    """A formula that forgets the held-out windows, or counts what a rank keeps."""
    from qmerge.pipeline.spread import Spread

    jobs, out = Ranked(zoo, tmp_path), tmp_path / "out"

    def work() -> None:
        inner, counted = Spread.sums, []

        def sums(self: Spread, *words: object) -> object:
            before = self.ranks.spent["bytes"]
            found = inner(self, *words)
            counted.append(self.ranks.spent["bytes"] - before)
            (tmp_path / f"sent-{self.ranks.rank}").write_text(f"{sum(counted)} {self.slots(False) + self.slots(True)}")
            return found

        Spread.sums = sums
        jobs.leave(out, "gptq")

    assert end(start([work] * size, jobs.log), LIMIT_S) == [0] * size, jobs.last_words()
    rows = [(tmp_path / f"sent-{rank}").read_text().split() for rank in range(size)]
    model = llama("small", 3, 64, 128, 32, 320)
    wanted = model.blocks * sum(sent_sums(group, size, int(rows[0][1])) for group in model.groups)
    assert sum(float(count) for count, _ in rows) == pytest.approx(wanted, rel=0.01)
