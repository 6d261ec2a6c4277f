"""Who may ask, from where, for what; and that no text that others wrote becomes anything but text."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import UserError
from orchestrator.web import security, server
from orchestrator.web.cli import _listen
from orchestrator.web.redact import REDACTED, Redactor, is_secret, numbers
from orchestrator.web.security import AccessTokens
from tests.web.made import MadeRun, a_home, queue_file
from tests.web.serving import TOKEN, Client, serving

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

EVIL = "<img src=x onerror=alert(1)></script ><script>alert(2)</script><!-- <script "
PATHS = ("/", "/static/app.js", "/metrics", "/api/me", "/api/runs", "/api/queue", "/api/nodes", "/api/events",
         "/api/actions", "/api/run/one", "/api/run/one/log", "/api/run/one/config")  # fmt: skip


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("static")
    (folder / "index.html").write_text("<!doctype html><head></head><body></body>")
    (folder / "app.js").write_text("export const x = 1;\n")
    (folder / "secret.txt").write_text("not the page's")
    before, server.STATIC = server.STATIC, folder
    home = a_home(tmp_path_factory.mktemp("home"))
    MadeRun(home, "one", now=time.time() - 60).submit().start().train(5)
    queue_file(home, time.time())
    (home.home / "outside.log").write_text("TOP SECRET FILE")
    with serving(home) as client:
        yield client
    server.STATIC = before


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sent", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "},
                                  {"Authorization": f"Basic {TOKEN}"}, {"Cookie": f"megaray_1={TOKEN}"},
                                  {"Authorization": f"Bearer {TOKEN}x"}])  # fmt: skip
def test_nothing_is_told_without_the_token(client: Client, path: str, sent: dict[str, str]) -> None:
    other = Client(client.port, client.shared, token=None, headers=sent)
    status, _, body = other.raw(path)
    assert status == 401 and b"dashboard.token" in body
    assert b"one" not in body.split(b"no token, or one")[0]


@pytest.mark.parametrize("path", [*PATHS[1:], "/healthz/", "/healthzx", "/healthz/../api/runs"])
@pytest.mark.parametrize("given", ["", "wrong", TOKEN])
def test_a_token_in_a_link_counts_on_the_page_itself_alone(client: Client, path: str, given: str) -> None:
    """And no other path is open because it begins as an open one does."""
    other = Client(client.port, client.shared, token=None)
    status, _, body = other.raw(f"{path}?token={given}")
    assert status == 401 and b"dashboard.token" in body


def test_an_action_needs_the_token_too(client: Client) -> None:
    other = Client(client.port, client.shared, token=None)
    assert "no token" in other.post({"action": "cancel", "target": "one"}, 401)["error"]


def test_health_needs_none_and_tells_nothing_else(client: Client) -> None:
    other = Client(client.port, client.shared, token=None)
    assert set(other.get("/healthz")) == {"ok", "as_of"}


def test_the_link_becomes_a_cookie_that_is_no_token(client: Client) -> None:
    browser = Client(client.port, client.shared, token=None)
    status, headers, _ = browser.raw(f"/?token={TOKEN}")
    assert status == 303 and headers["location"] == "/"
    cookie = headers["set-cookie"]
    assert TOKEN not in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    browser.headers["Cookie"] = cookie.split(";")[0]
    assert browser.get("/api/me")["who"] == "ann"
    assert browser.raw("/?token=wrong")[0] == 401
    value = cookie.split(";")[0].split("=", 1)[1]
    assert Client(client.port, client.shared, token=value).raw("/api/me")[0] == 401, (
        "a stolen cookie is not a token"
    )
    browser.headers["Cookie"] = f"megaray_{client.port + 1}={value}"
    assert browser.raw("/api/me")[0] == 401, "another server's cookie"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil.example",
        "a b",
        "[::1",
        "127.0.0.1/x",
    ],
)
def test_other_hosts_are_refused(client: Client, host: str) -> None:
    status, _, body = client.raw("/api/runs", Host=host)
    assert status in (400, 403) and b"run_id" not in body


@pytest.mark.parametrize("host", ["127.0.0.1:{}", "localhost:{}", "LOCALHOST:{}", "[::1]:{}"])
def test_own_names_are_answered(client: Client, host: str) -> None:
    assert client.raw("/api/runs", Host=host.format(client.port))[0] == 200


def test_another_name_must_be_allowed(tmp_path: Path) -> None:
    with serving(a_home(tmp_path), names=("Box.example",)) as client:
        assert client.raw("/api/runs", Host="box.example")[0] == 200
        assert client.raw("/api/runs", Host="other.example")[0] == 403


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        "http://localhost:{port}",
        "file://",
        "https://127.0.0.1:{port}.evil",
    ],
)
def test_other_origins_are_refused(client: Client, origin: str) -> None:
    """`localhost` and `127.0.0.1` are two origins for a browser too."""
    host = f"127.0.0.1:{client.port}"
    asked = origin.format(port=client.port)
    status, headers, body = client.raw("/api/runs", Host=host, Origin=asked)
    assert status == 403 and b"another origin" in body and "access-control-allow-origin" not in headers
    assert (
        client.raw("/api/actions", "POST", b"{}", Host=host, Origin=asked, Content_Type="application/json")[0]
        == 403
    )


def test_the_own_origin_is_answered_and_other_sites_are_not(client: Client) -> None:
    host = f"127.0.0.1:{client.port}"
    assert client.raw("/api/runs", Host=host, Origin=f"http://{host}")[0] == 200
    assert client.raw("/api/runs", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="cors")[0] == 403
    assert client.raw("/api/runs", Sec_Fetch_Site="same-origin")[0] == 200
    assert client.raw("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200, (
        "a link in a mail opens the page"
    )


def test_a_form_of_another_page_can_do_nothing(client: Client) -> None:
    body = json.dumps({"action": "cancel", "target": "one"}).encode()
    assert client.raw("/api/actions", "POST", body, Content_Type="text/plain")[0] == 400
    status, headers, _ = Client(client.port, client.shared, token=None).raw(f"/?token={TOKEN}")
    browser = Client(
        client.port, client.shared, token=None, headers={"Cookie": headers["set-cookie"].split(";")[0]}
    )
    answer = browser.post({"action": "cancel", "target": "one"}, 403)
    assert "needs an Origin" in answer["error"]
    host = f"127.0.0.1:{client.port}"
    assert "confirm" in browser.post(
        {"action": "cancel", "target": "one"}, 409, Host=host, Origin=f"http://{host}"
    )


TRAVERSALS = [
    "/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/static/%2fetc%2fpasswd",
    "/static/....//server.py",
    "/static/secret.txt", "/static/", "/static/app.js%00", "/static/app.js/..", "/api/run/..%2f..%2foutside/log",
    "/api/run/../../outside", "/api/run/%2e%2e/config", "/api/run/one%2f..%2f..", "/api/run/one/..%2f..%2foutside.log",
    "/api/run//log", "//evil.example/", "/static/%5c..%5cserver.py", "/api/run/%00", "/api/run/one/log/../../../x",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_leads_out(client: Client, path: str) -> None:
    status, _, body = client.raw(path)
    assert status in (400, 404), body
    assert (
        b"SECRET" not in body
        and b"root:" not in body
        and b"not the page" not in body
        and b"import" not in body
    )


@pytest.mark.parametrize(
    "query",
    ["rank=../../outside", "rank=1&attempt=../..", "rank=-1", "rank=1e9", "attempt=-1", "rank=00000.log"],
)
def test_no_parameter_becomes_a_path(client: Client, query: str) -> None:
    for what in ("log", "stack", "heat", "layout"):
        status, _, body = client.raw(f"/api/run/one/{what}?{query}")
        assert b"SECRET" not in body
        assert status == 400 or (what in ("heat", "layout") and status == 200 and "rank" in query)


def test_a_link_in_the_runs_folder_leads_nowhere_new(client: Client) -> None:
    """A rank may write whatever it wants into its own folder; the names that are opened are ours."""
    (client.shared.live.home.run("one").attempt(1).evidence).mkdir(exist_ok=True)
    assert client.raw("/api/run/one/stack?rank=0")[0] == 200


def test_every_answer_has_its_headers(client: Client) -> None:
    for path, token in (
        ("/", TOKEN),
        ("/api/runs", TOKEN),
        ("/api/runs", None),
        ("/nothing", TOKEN),
        ("/static/app.js", TOKEN),
    ):
        _, headers, _ = Client(client.port, client.shared, token=token).raw(path)
        for name, value in security.HEADERS.items():
            if name != "Cache-Control":
                assert headers[name.lower()] == value, (path, name)
    policy = security.POLICY
    assert (
        "unsafe" not in policy
        and "default-src 'none'" in policy
        and "*" not in policy
        and "http" not in policy
    )
    assert client.raw("/static/app.js")[1]["content-type"].startswith("text/javascript")


def test_methods_that_are_not_there_and_large_bodies(client: Client) -> None:
    assert client.raw("/api/runs", "POST", b"")[0] == 405
    assert client.raw("/api/runs", "DELETE")[0] == 405
    assert client.raw("/api/actions", "POST", b"x" * 200_000, Content_Type="application/json")[0] == 413
    for body in (b"", b"[]", b"{", b'"x"', b'{"action": {"a": 1}}', b"\xff"):
        assert client.raw("/api/actions", "POST", body, Content_Type="application/json")[0] == 400


def test_scripts_stay_text(tmp_path: Path) -> None:
    home = a_home(tmp_path)
    run = (
        MadeRun(home, "x<b>y", owner=EVIL, model=EVIL, now=time.time() - 60)
        .submit()
        .start()
        .train(3)
        .save_failed(EVIL)
    )
    run.run.attempt(1).log(0).write_text(
        f"{EVIL}\n\x1b]0;title\x07\x1b[2Jcleared \u202egnp.exe\nprogress 1\rprogress 2\n"
    )
    queue_file(home, time.time(), damage=[EVIL], waiting=[{"run": "x<b>y", "position": 1, "reason": EVIL}])
    with serving(home) as client:
        for path in (
            "/api/runs",
            "/api/queue",
            "/api/run/x%3Cb%3Ey",
            "/api/run/x%3Cb%3Ey/log",
            "/api/run/x%3Cb%3Ey/checkpoints",
            f"/api/run/{'%3Cscript%3E'}",
        ):
            _, headers, body = client.raw(path)
            assert (
                headers["content-type"] == "application/json; charset=utf-8"
                and headers["x-content-type-options"] == "nosniff"
            )
            json.loads(body)
        lines = [line["text"] for line in client.get("/api/run/x%3Cb%3Ey/log")["lines"]]
        assert lines == [EVIL, "cleared gnp.exe", "progress 2"]
        assert EVIL not in client.raw("/static/%3Cscript%3E")[2].decode()


SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "MY_PASSWORD": "correct horse",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz0123",
}


def test_secrets_are_taken_out_of_all_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = a_home(tmp_path)
    run = (
        MadeRun(home, "one", now=time.time() - 60).submit(runtime_env={"env_vars": SECRETS}).start().train(2)
    )
    run.run.source.write_text(
        json.dumps({"command": f"WANDB_API_KEY={SECRETS['WANDB_API_KEY']} submit", "environment": SECRETS})
    )
    run.run.config.write_text(
        f"tracking:\n  api_key: {SECRETS['WANDB_API_KEY']}\nurl: https://ann:pw12345678@host/x\n"
    )
    text = "\n".join(f"{name}={value}" for name, value in SECRETS.items())
    run.run.attempt(1).log(0).write_text(f"{text}\nexport HF_TOKEN={SECRETS['HF_TOKEN']}\n"
                                         "header: Authorization: Bearer abcdefghijklmnopqrstu\n"
                                         f"the value {SECRETS['MY_PASSWORD']} alone\n{TOKEN}\n")  # fmt: skip
    kept = run.run.attempt(1).evidence
    kept.mkdir()
    (kept / "00000.stack.txt").write_text(f"locals: key='AKIAABCDEFGHIJKLMNOP' {SECRETS['HF_TOKEN']}")
    monkeypatch.setenv("MY_PASSWORD", SECRETS["MY_PASSWORD"])
    with serving(home) as client:
        for path in (
            "/api/runs",
            "/api/run/one",
            "/api/run/one/log",
            "/api/run/one/config",
            "/api/run/one/stack",
            "/api/run/one/incidents",
            "/metrics",
        ):
            body = client.raw(path)[2].decode()
            for value in (
                *SECRETS.values(),
                TOKEN,
                "pw12345678",
                "AKIAABCDEFGHIJKLMNOP",
                "abcdefghijklmnopqrstu",
            ):
                assert value not in body, (path, value)
        assert client.get("/api/run/one/log")["lines"][0]["text"] == f"WANDB_API_KEY={REDACTED}"
        assert client.get("/api/run/one")["source"]["environment"]["HF_TOKEN"] == REDACTED


VALUE = "Zx81kdmWq0abc123"
SHOWN_BEFORE = (
    f"x-api-key: {VALUE}", f"--wandb-api-key={VALUE}", f"--wandb-api-key {VALUE}", f"access-key: {VALUE}",
    f"aws-secret-access-key: {VALUE}", f"PRIVATE-KEY={VALUE}", f"{{'api-key': '{VALUE}'}}",
    f"http://10.0.0.1:8260/?token={VALUE}", f"https://host/x?a=1&token={VALUE}&b=2", f"token={VALUE}",
    f"hf auth: token: {VALUE}", f"accessToken: '{VALUE}'", f"--token {VALUE}", f"X-Auth-Token: {VALUE}",
    f"https://account.blob.host/c?sv=2022&sig={VALUE}%3D", f"https://s3/x?X-Amz-Signature={VALUE}&X-Amz-Date=2",
    f"https://s3/x?X-Amz-Security-Token={VALUE}", f"https://host/x?key={VALUE}", f"https://{VALUE}@github.com/x",
    f"Authorization: Token {VALUE}", f"authorization: AWS4-HMAC-SHA256 SignedHeaders=host, Signature={VALUE}",
    f"Cookie: a=b; megaray_8260={VALUE}", f"machine api.wandb.ai login user password {VALUE}",
    json.dumps({"error": json.dumps({"api_key": VALUE})}), json.dumps(json.dumps({"token": VALUE})),
)  # fmt: skip


@pytest.mark.parametrize("text", SHOWN_BEFORE)
def test_a_secret_is_hidden_however_its_name_is_written(text: str) -> None:
    made = Redactor({}).text(f"rank 3 | {text}")
    assert VALUE not in made and REDACTED in made and made.startswith("rank 3 | ")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["a-", "token-", "--a", "secret", "?a-", "://", " login", "token ", "-"])
def test_a_long_line_is_read_once(text: str) -> None:
    """Work that grew with the square of a line's length would take minutes here."""
    assert REDACTED not in Redactor({}).text(text * 20_000)


def test_what_is_no_secret_stays() -> None:
    for name in (
        "tokens",
        "tokens_per_second",
        "tokenizer",
        "key_value_heads",
        "keys",
        "token_count",
        "author",
        "special_tokens",
        "end_token",
        "data.eos_token",
        "seconds_per_token",
    ):
        assert not is_secret(name), name
    for name in (
        "WANDB_API_KEY",
        "api-key",
        "tracking.api_key",
        "HF_TOKEN",
        "secret",
        "db_password",
        "AWS_SECRET_ACCESS_KEY",
        "Authorization",
        "PRIVATE_KEY",
        "access-key",
        "x-api-key",
        "accessToken",
        "X-Amz-Signature",
        "token",
    ):
        assert is_secret(name), name
    redact = Redactor({})
    for text in (
        "step 12 | loss 2.41 | 51,234 tok/s",
        "tokens: 12345",
        "special_tokens=['<s>']",
        "rank 1: all_reduce(key=3)",
        "sha256 0123456789abcdef" * 2,
        "51234 tokens/s | max_tokens=4096 max_token=4096 token_count: 7 | bytes per token: 12.5 kB",
        "seconds/token=3.2us, loss per token = 1.2345678901234e-05 (token_id=50256) token: 12/100",
        "end_token: <|endoftext|>",
        "eos_token='</s>' pad_token=[PAD] token=nan token=$HF_TOKEN",
        "Unexpected token: identifier; next token: hello",
        "--tokenizer gpt2 --tokens 5 tokenizer=gpt2",
        "no kernel with signature: aten::add(x); sort key: loss",
        "?names=loss&axis=step",
    ):
        assert redact.text(text) == text
    assert redact.tree({"a": float("nan"), "b": (1, 2.5, True, None)}) == {
        "a": None,
        "b": [1, 2.5, True, None],
    }
    assert numbers([1.23456789, float("inf"), 0.0, 1e-300]) == [1.23457, None, 0.0, 1e-300]


def test_the_token_file(tmp_path: Path) -> None:
    path = tmp_path / "dashboard.token"
    made = AccessTokens.of(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(made.own) > 30
    assert AccessTokens.of(path).own == made.own, "a restarted server keeps its cookies"
    path.write_text(f"# people\n{'a' * 20} ann\n{'b' * 20} bob smith\n")
    tokens = AccessTokens.of(path)
    assert (
        tokens.who("b" * 20) == "bob smith" and tokens.who("c" * 20) is None and tokens.who("\udcff") is None
    )
    path.write_text("short x\n")
    with pytest.raises(UserError, match="token 1 is shorter than 16"):
        AccessTokens.of(path)
    path.write_text("")
    with pytest.raises(UserError, match="holds no token"):
        AccessTokens.of(path)
    path.chmod(0o644)
    with pytest.raises(UserError, match=f"chmod 600 {path}"):
        AccessTokens.of(path)
    with pytest.raises(UserError, match="can't be kept"):
        AccessTokens.of(tmp_path / "no folder" / "token")


def test_slow_clients_hold_nobody_up(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port)) as slow:
        slow.sendall(b"GET /api/runs HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        assert client.raw("/api/runs")[0] == 200
    assert os.getpid()


@pytest.mark.parametrize("port", [-1, 65536, 99999999])
def test_a_port_out_of_range_is_refused_and_not_cut_down(port: int) -> None:
    with pytest.raises(UserError, match=f"--port {port} is out of range; type one between 0 and 65535"):
        _listen("127.0.0.1", port)
