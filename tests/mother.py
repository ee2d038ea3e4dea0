"""A process that has imported what takes long, and becomes `python SCRIPT` or `gradlens COMMAND` in forks of itself.

To import torch takes seconds of processor time, a fork none. A fork does what a new interpreter would: it takes the
environment, folder and arguments that it is asked for, a fresh `__main__`, runs `sitecustomize` from PYTHONPATH, then the
script, and ends as Python ends. `os.execv`, by which `gradlens run` makes way for the script, starts over in the same fork.
gradlens itself is not imported before the fork.

Asked by `tests.forks`, one line of JSON a run; answers with the exit status.
"""

import builtins
import importlib.util
import json
import os
import runpy
import sys
import types

COSTLY = ["torch", "torch._dynamo", "pandas", "pyarrow.parquet", "tensorboard.compat.proto.event_pb2", "click", "rich"]
PATH = list(sys.path)  #: started with -P, without a folder of its own


class Executed(BaseException):
    """The process is to become another program."""


def execute(path, arguments):
    raise Executed(arguments)


def take_over(request):
    """This fork has the streams, folder and environment of the run that was asked for."""
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        opened = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.execv = execute


def customize():
    """What Python imports before a script; of those on PYTHONPATH only, the machine's own ran when this process began."""
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        path = os.path.join(folder, "sitecustomize.py")
        if os.path.exists(path):
            runpy.run_path(path)
            return


def prepared(words):
    """The code of `python WORDS`, for which there is a `__main__` now."""
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-c":
        sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv, sys.path[:] = ["-c", *words[2:]], ["", *PATH]
        return compile(words[1], "<string>", "exec")
    if words[:2] == ["-m", "gradlens"]:
        sys.argv, sys.path[:] = words[1:], [os.getcwd(), *PATH]
        path = importlib.util.find_spec("gradlens.__main__").origin
    else:
        path, sys.argv = words[0], words
        sys.path[:] = [os.path.dirname(os.path.abspath(path)), *PATH]
        customize()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = path, builtins
    with open(path) as file:
        return compile(file.read(), path, "exec")


for module in COSTLY:
    importlib.import_module(module)
while line := sys.stdin.buffer.raw.readline():
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

take_over(json.loads(line))
words, line = json.loads(line)["words"], None
while words:  # at the top level: a script looks for its models in the frames below
    try:
        code, words = prepared(words), None
        exec(code, vars(sys.modules["__main__"]))
    except Executed as executed:
        words = executed.args[0][1:]
    except Exception as error:
        own = error.with_traceback(error.__traceback__.tb_next)  # without this frame
        sys.excepthook(type(own), own, own.__traceback__)
        sys.exit(1)
