"""Scores the saved answers of a run anew."""

from pathlib import Path

from .cells import result_of, summarize_items
from .records import RunFile, read_run
from .setup import build_judge, build_task


def rejudge(path, output, config, *, command=None):
    """Score the saved answers of a run by the judge of a configuration, without any model.

    Args:
        path (`Path`): the run file.
        output (`Path`): a new file with the same items and new cells.
        config ([`RunConfig`]): of which the task and the judge are used.
        command (`str`, *optional*): what remakes the file.

    Returns:
        `list[Result]`

    Raises:
        ValueError: `path` is no run file or holds no finished cell, or `output` is there and of another configuration.
    """
    header, lines = read_run(path)
    task = build_task(config.task)
    judge = build_judge(config.judge, output) if task.needs_judge else None
    cells = [line for line in lines if line["kind"] == "cell"]
    if not cells:
        raise ValueError(f"`{path}` must hold at least one finished cell, got none")
    settings = {**header["config"], "judge": config.settings()["judge"], "rejudged": Path(path).name}
    run = RunFile(
        output, settings, {**{k: header[k] for k in ("versions", "seed") if k in header}, "command": command}
    )
    for line in lines:
        if line["kind"] == "item" and run.get("item", line["key"], line["image"]) is None:
            run.add(**line)
    for line in cells:
        if run.get("cell", line["key"]) is None:
            summary = summarize_items(task, run.items(line["key"]), judge)
            summary |= {} if judge is None else {"judge": judge.describe()}
            summary |= {"org": line["summary"]["org"]} if "org" in line["summary"] else {}
            run.add("cell", line["key"], cell=line["cell"], summary=summary)
    return [result_of(line, Path(output).name) for line in run.cells()]
