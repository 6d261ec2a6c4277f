"""What may be done through the page: each asked once more, done by a bounded child process, and written down with who."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError, from_json
from orchestrator.web.read_model import HomeReadModel
from orchestrator.web.redact import Redactor

ACTIONS = ("cancel", "cordon", "uncordon", "dump_stacks")
_CONFIRM = 60.0
"""Seconds for which a question may be answered."""
_ASKED = 256
"""Questions that wait for an answer, at most."""
_SECONDS = 90.0
_SHOWN = 200
_TAIL = 1 << 17
_REASON = 300


class ActionFailed(Exception):
    """The cluster didn't do it."""


@dataclass(frozen=True)
class _Confirmation:
    key: tuple[str, str, str, str]
    """Action, target, reason and who."""
    until: float


class Actions:
    """Takes actions of the page.

    Args:
        live: the home.
        redact: for what is written down.
        command: the child that acts; it reads an order as JSON and prints the answer as JSON.
    """

    def __init__(self, live: HomeReadModel, redact: Redactor, command: tuple[str, ...] = ()) -> None:
        self._live, self._redact = live, redact
        self._command = command or (sys.executable, "-m", "orchestrator.web.act")
        self._path = live.home.dashboard_actions
        self._questions: dict[str, _Confirmation] = {}
        self._busy = asyncio.Lock()

    async def submit(self, request: Mapping[str, str], who: str, source: str) -> dict[str, Any]:
        """Ask once more, or do it where it is confirmed.

        Args:
            request: `action`, `target`, `reason` and `confirm`, as the page sent them.
            who: has asked.
            source: address that it came from.

        Returns:
            `confirm` and `question`, or `ok` and `said`.

        Raises:
            UserError: for what can't be asked.
            Refused: where the cluster didn't do it.
        """
        action, target, reason = request["action"], request["target"], request["reason"].strip()[:_REASON]
        if action not in ACTIONS:
            raise UserError(f"action='{action[:40]}' is none; use one of {', '.join(ACTIONS)}")
        target, question = self._question(action, target, reason)
        now, key = time.monotonic(), (action, target, reason, who)
        self._questions = {nonce: one for nonce, one in self._questions.items() if one.until > now}
        nonce = request["confirm"]
        if not nonce:
            if len(self._questions) >= _ASKED:
                raise UserError(f"{_ASKED} actions wait to be confirmed; confirm some, or wait a minute")
            nonce = secrets.token_urlsafe(16)
            self._questions[nonce] = _Confirmation(key, now + _CONFIRM)
            return {"confirm": nonce, "question": question}
        known = self._questions.pop(nonce, None)  # whatever comes of it, it counts once
        if known is None or known.key != key:
            raise UserError(f"this action was not confirmed within {_CONFIRM:.0f} s; ask for it again")
        async with self._busy:
            ok, said = await self._do({"action": action, "target": target, "reason": reason, "by": who})
        self._write(
            {
                "who": who,
                "from": source,
                "action": action,
                "target": target,
                "reason": reason,
                "ok": ok,
                "said": said,
            }
        )
        self._live.refresh_now()
        if not ok:
            raise ActionFailed(said)
        return {"ok": True, "said": said}

    def _question(self, action: str, target: str, reason: str) -> tuple[str, str]:
        """What exactly is meant, and the question to a person."""
        if action in ("cancel", "dump_stacks"):
            state = self._live.existing(target)
            row, run_id = state.row or {}, state.run.run_id
            if state.terminal:
                raise UserError(f"run '{run_id}' is {row['state']} already")
            where = f"{run_id} ({row['state']}, step {row['step']} of {row['steps']})"
            if action == "cancel":
                return (
                    run_id,
                    f"Cancel {where}? Its ranks finish their step and save first; `resume` continues it.",
                )
            if not row["nodes"]:
                raise UserError(
                    f"run '{run_id}' is {row['state']}: it has no ranks whose stacks could be written"
                )
            return run_id, f"Write the stacks of all ranks of {where}? Each is paused for a moment."
        nodes = {str(node.get("ip")): node for node in self._live.snapshot.queue.get("nodes", [])}
        node = nodes.get(target) or next((n for n in nodes.values() if n.get("hostname") == target), None)
        if node is None:
            raise UserError(f"'{target[:80]}' is not a node of this cluster; `nodes` shows them")
        if action == "cordon" and not reason:
            raise UserError("reason='': say why the node is kept free, for whoever looks at it next")
        runs = ", ".join(node.get("runs", [])) or "nothing"
        name = f"{node['ip']} ({node.get('hostname', '')})"
        if action == "cordon":
            return str(node["ip"]), f"Keep runs from {name}? What runs there now ({runs}) continues."
        return str(node["ip"]), f"Let runs on {name} again? Its suspicions are forgotten too."

    async def _do(self, order: dict[str, str]) -> tuple[bool, str]:
        """Have a child do it, since Ray may hang and is large."""
        env = os.environ | {"MEGARAY_HOME": str(self._live.home.home)}
        child = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        try:
            out, err = await asyncio.wait_for(child.communicate(json.dumps(order).encode()), _SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
            await child.wait()
            return (
                False,
                f"the cluster didn't answer in {_SECONDS:.0f} s; look at the run before you ask again",
            )
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
            raise
        try:
            reply = from_json(out.splitlines()[-1])
            return bool(reply["ok"]), self._redact.text(str(reply["said"]))
        except (ValueError, LookupError, TypeError):
            last = (err.decode(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"])[
                -1
            ]
            return False, self._redact.text(f"it could not be done: {last}")

    def _write(self, row: dict[str, Any]) -> None:
        data = (json.dumps({"time": self._live.clock()} | self._redact.tree(row)) + "\n").encode()
        with contextlib.suppress(OSError):  # it was done all the same; a full disk mustn't tell otherwise
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)

    def recent(self) -> list[dict[str, Any]]:
        """The newest actions, newest first."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                lines = file.read().splitlines()
        except OSError:
            return []
        rows = []
        for line in lines[-_SHOWN:]:
            with contextlib.suppress(ValueError, TypeError):
                rows.append(dict(from_json(line)))
        return rows[::-1]
