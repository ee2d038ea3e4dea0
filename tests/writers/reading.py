"""Event files, read back with TensorBoard's own loaders, which check every record's checksums."""

from collections import defaultdict

from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.util import tensor_util


def events(path):
    """Every event of a file, up to the first record that is torn or whose checksum is wrong."""
    return list(LegacyEventFileLoader(str(path)).Load())


def points(path):
    """Tag -> [(step, value)] of a file: floats and arrays."""
    result = defaultdict(list)
    for event in events(path):
        for value in event.summary.value:
            given = value.simple_value if value.HasField("simple_value") else tensor_util.make_ndarray(value.tensor)
            result[value.tag].append((event.step, given))
    return dict(result)


def accumulated(logdir):
    """What TensorBoard makes of a directory, with every point kept."""
    return EventAccumulator(str(logdir), dict.fromkeys(("scalars", "tensors"), 0)).Reload()


def scalars(logdir, tag):
    """[(step, value)] of one tag, after TensorBoard has dropped what a restart replaced."""
    return [(event.step, event.value) for event in accumulated(logdir).Scalars(tag)]


def steps(logdir, tag):
    """The steps of a tag as TensorBoard's server has them, which also drops pictures, histograms and texts."""
    served = plugin_event_accumulator.EventAccumulator(str(logdir), {"tensors": 0}).Reload()
    return [event.step for event in served.Tensors(tag)]


def text(point):
    """The Markdown of a text's point."""
    return point[1].item().decode()
