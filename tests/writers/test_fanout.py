"""Several writers as one."""

import pytest

from gradlens.errors import GradlensWarning
from gradlens.writers.base import Writer
from gradlens.writers.fanout import Fanout


class Recorder:
    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def _call(self, name):
        self.calls.append(name)
        if name == self.fails_at:
            raise OSError("broken")

    def write(self, record):
        self._call(record)

    def flush(self):
        self._call("flush")

    def close(self):
        self._call("close")


def test_each_writer_gets_each_record():
    """Records, flushes and the close reach every writer, in order; a fan-out is a writer itself."""
    a, b = Recorder(), Recorder()
    fanout = Fanout([a, Fanout([b])])
    assert isinstance(fanout, Writer)
    for record in (1, 2):
        fanout.write(record)
    fanout.flush()
    fanout.close()
    assert a.calls == b.calls == [1, 2, "flush", "close"]


@pytest.mark.parametrize("fails_at", [1, "flush", "close"])
def test_a_writer_that_raises_is_left_out(fails_at):
    """It is named once, gets no further record but one close, and the others see everything."""
    bad, good = Recorder(fails_at), Recorder()
    fanout = Fanout([bad, good])
    with pytest.warns(GradlensWarning, match="Recorder failed.*broken") as caught:
        for record in (1, 2):
            fanout.write(record)
        fanout.flush()
        fanout.write(3)
        fanout.close()
    assert len(caught) == 1
    assert good.calls == [1, 2, "flush", 3, "close"]
    assert [type(error) for _, error in fanout.failed] == [OSError]
    assert bad.calls.count("close") == 1
    assert (3 in bad.calls) is (fails_at == "close")


class Reader(Recorder):
    """A writer that takes activations too, until it fails."""

    def write_activations(self, passes):
        self._call(passes[0])


def test_a_writer_that_cannot_take_activations_keeps_all_else():
    """It gets no more of those, everything else as before, and is told of once; writers without them are not asked."""
    lost, bad, good, plain = [], Reader("bad"), Reader(), Recorder()
    fanout = Fanout([bad, good, plain], on_loss=lambda writer, error: lost.append((writer, str(error))))
    for passes in (["fine"], ["bad"], ["later"], []):
        fanout.write_activations(passes)
        fanout.write(1)
    fanout.close()
    assert bad.calls == ["fine", 1, "bad", 1, 1, 1, "close"]
    assert good.calls == ["fine", 1, "bad", 1, "later", 1, 1, "close"]
    assert plain.calls == [1, 1, 1, 1, "close"]
    assert lost == [(bad, "broken")]
    assert not fanout.failed
