"""fedlora ota: a repository from its keys to a halted release, by commands alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedlora as fl
from tests.ota.folder import URL, read_from
from tests.ota.world import make_bundle
from tests.store.states import adapter

COMMAND = ("ota",)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLORA_OTA_REPOSITORY", "releases")
    monkeypatch.setenv("FEDLORA_OTA_KEYS", "keys")
    for seed in (1, 2):
        fl.save_adapter(adapter(seed), f"{seed}.safetensors", provenance={"round": seed})


def test_from_init_to_a_device(run, ask, monkeypatch) -> None:
    from fedlora.ota import DeviceUpdater
    from fedlora.store import Store

    code, out, _ = run("init", "--root-keys", 1, "--root-threshold", 1)
    assert code == 0
    assert "devices are shipped with releases/metadata/1.root.json" in out
    assert ask("publish", "1.safetensors", "--rollout", 0)["percent"] == 0
    store = Store.create("state", make_bundle(Path("bundle")))
    read_from(Path("releases"), monkeypatch)
    root = Path("releases/metadata/1.root.json").read_bytes()
    updater = DeviceUpdater(URL, store, bootstrap=root)
    assert updater.fetch() is None
    assert run("rollout", 1, 100)[1] == "release 1 is offered to 100 % of the devices\n"
    release = updater.fetch()
    assert release is not None
    assert release.provenance == {"round": 1}
    assert ask("publish", "2.safetensors", "--notes", "next")["version"] == 2
    assert ask("halt", 2) == {"version": 2, "percent": 100.0, "halted": True}
    assert updater.fetch() == release
    assert ask("republish", 2, "--rollout", 12.5)["version"] == 3
    assert run("halt", 3, "--withdraw")[1] == "release 3 is halted: offered to nobody\n"
    assert run("refresh")[1] == "releases: renewed for 24 hours\n"
    assert len(ask("keys", "--rotate", "timestamp")["new"]) == 1
    assert updater.fetch() == release


def test_status_needs_no_keys(run, ask) -> None:
    assert run("init", "--root-keys", 1, "--root-threshold", 1)[0] == 0
    run("publish", "1.safetensors", "--channel", "beta", "--rollout", 5, "--limit", 10)
    Path("keys").rename("elsewhere")
    found = ask("status")
    assert found["published"]
    assert found["roles"]["timestamp"]["hours_left"] == pytest.approx(24, abs=0.2)
    (release,) = found["channels"]["beta"]
    assert (release["version"], release["limit"]) == (1, 10.0)
    assert release["rollout"] == {"percent": 5.0, "halted": False}
    code, out, _ = run("status")
    assert code == 0
    assert "beta" in out
    assert "5 %" in out
    assert "1 of 1" in out


def test_a_release_that_is_signed_offline_says_what_is_left_to_do(run) -> None:
    assert run("init", "--root-keys", 1, "--root-threshold", 1)[0] == 0
    Path("keys/online").rename("online")
    code, out, _ = run("publish", "1.safetensors", "--rollout", 1)
    assert code == 0
    assert "signed, not offered yet" in out
    assert "fedlora ota rollout 1 1" in out
    assert "run fedlora ota refresh" in run("status")[1]


REFUSED = {
    "no repository": (["publish", "1.safetensors"], 1, "fedlora ota init"),
    "no keys": (["refresh", "--keys", "none"], 1, "private keys of the role"),
    "no release": (["rollout", 9, 10], 1, "expected a release of this repository, found 9"),
    "no adapter": (["publish", "none.safetensors"], 1, "none.safetensors"),
    "bundle that is none": (["publish", "1.safetensors", "--bundle", "x"], 2, "--bundle x"),
    "more than all": (["publish", "1.safetensors", "--rollout", 101], 2, "0 to 100 percent"),
    "strange channel": (["publish", "1.safetensors", "--channel", "A"], 2, "channel: expected"),
    "two things at once": (["keys", "--rotate", "root", "--renew", "root"], 2, "found both"),
    "strange role": (["keys", "--rotate", "boss"], 1, "expected a role of root, targets"),
}


@pytest.mark.parametrize(("arguments", "code", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_one_line(run, request, arguments, code, text) -> None:
    if "no repository" not in request.node.name:
        assert run("init", "--root-keys", 1, "--root-threshold", 1)[0] == 0
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert err.startswith("fedlora: ")
    assert err.count("\n") == 1
    assert text in err
