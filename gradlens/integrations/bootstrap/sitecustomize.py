"""Imported by Python itself, before a script that `gradlens run` has started: waits until the script has imported torch.

Only the standard library is imported here, and nothing is left behind: the folder leaves `sys.path`, the machine's own
`sitecustomize` is run as if this one were not there, and the script is the real `__main__` of its process.
"""

import importlib.util
import os
import sys


def _make_way():
    """Take this folder off the path and import the `sitecustomize` that it hid, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != here]
    sys.path_importer_cache.pop(here, None)
    own = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # noqa: F401 - the machine's own
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        if own is not None:
            sys.modules.setdefault("sitecustomize", own)


class _AfterTorch:
    """A finder that finds nothing itself: it has `begin` called when the import of torch is over."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader):
        execute = loader.exec_module

        def exec_module(module):
            del loader.exec_module
            execute(module)
            _begin()

        loader.exec_module = exec_module


def _begin():
    try:
        if importlib.util.find_spec("gradlens") is None:
            package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
            sys.path.append(os.path.dirname(package))
        from gradlens.integrations.script import begin

        begin()
    except Exception as error:  # noqa: BLE001 - the script runs whatever happens to us
        print(f"gradlens: the script runs unwatched: {type(error).__name__}: {error}", file=sys.stderr)


_make_way()
if os.environ.get("GRADLENS_RUN"):
    if "torch" in sys.modules:  # the machine's own has imported it
        _begin()
    else:
        sys.meta_path.insert(0, _AfterTorch())
