"""Addresses are printed and stored without their secrets, whatever they are written like."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from slotscops.config import Config, load_config, to_mapping, to_yaml
from slotscops.core import console
from slotscops.core.address import Address, hide_secrets
from slotscops.core.errors import UserError, first_line

SHOWN = {
    "shards/horse": "shards/horse",
    "odd@name?a=b": "odd@name?a=b",  # a folder
    "https://host/horse": "https://host/horse",
    "https://host:8080/a@b/horse": "https://host:8080/a@b/horse",
    "s3://bucket/horse": "s3://bucket/horse",
    "https://user:word@host/horse": "https://***@host/horse",
    "https://word@host": "https://***@host",
    "https://user:wo@rd@host:80/horse": "https://***@host:80/horse",
    "https://[::1]:80/horse?sig=word": "https://[::1]:80/horse?sig=***",
    "https://host/horse?sig=word&se=word;x=word": "https://host/horse?sig=***&se=***&x=***",
    "https://host/horse?word": "https://host/horse?***",
    "https://host?sig=word/a@b": "https://host?sig=***",
    "https://host/horse#word": "https://host/horse#***",
    "https://host/horse?a=word#word": "https://host/horse?***",
    "https://user:wo/rd@host/horse": "https://***",
    "https://user:wo?rd@host/horse": "https://***",
    "simplecache::https://user:word@host/horse": "simplecache::https://***@host/horse",
    "zip://a.zip::https://user:word@host/horse": "zip://***",
}


@pytest.mark.parametrize("whole", SHOWN)
def test_an_address_is_shown_without_its_secrets(whole: str) -> None:
    address = Address(whole)
    assert str(address) == f"{address}" == SHOWN[whole]
    assert repr(address) == repr(SHOWN[whole])
    assert address.reveal() == whole
    assert address.has_secret == (SHOWN[whole] != whole)
    assert Address(str(address)).lost_secret == address.has_secret
    assert pickle.loads(pickle.dumps(address)) == address  # loader workers open it too
    if "://" in whole:
        assert hide_secrets(f"at '{whole}', again") == f"at '{SHOWN[whole]}', again"


@example("[", "]?", "https")
@example("[", "]/", "https")
@given(
    st.text("abc:@=&%[]", max_size=8),
    st.text("abc:/@?#=&%[]", max_size=8),
    st.sampled_from(["https", "s3", "simplecache::https"]),
)
def test_no_password_is_shown_whatever_is_in_it(user: str, around: str, scheme: str) -> None:
    for whole in (f"{scheme}://{user}:SECRET{around}@host/horse", f"{scheme}://host/horse?{user}=SECRET{around}"):
        address = Address(whole)
        assert "SECRET" not in f"{address} {address!r} {address.name} {hide_secrets(whole)}"


def test_a_file_of_a_folder_lies_before_the_query() -> None:
    assert Address("https://host/horse/?sig=a").file("index/x.json").reveal() == "https://host/horse/index/x.json?sig=a"
    assert Address("https://host/horse").file("x").reveal() == "https://host/horse/x"


def test_the_name_of_an_address_says_nothing_of_where_it_lies() -> None:
    names = {"a/horse": "horse", "https://u:pass@host": "shards", "https://u:pass@host/a/horse/?sig=x": "horse"}
    assert {whole: Address(whole).name for whole in names} == names


def test_a_message_of_another_library_is_cleaned() -> None:
    address = Address("https://user:my%20word@host/horse?sig=a%2Fbcd")
    message = "401, url='https://host/horse?sig=a/bcd', login user:my word, sig a%2Fbcd"
    assert not any(secret in address.clean(message) for secret in ("my word", "my%20word", "a/bcd", "a%2Fbcd"))
    assert first_line(OSError("at https://u:word@host/x")) == "at https://***@host/x"


def test_settings_hold_the_whole_address_and_are_written_without_its_secrets(tmp_path: Path) -> None:
    whole = "https://user:word@host/horse?sig=word"
    config = load_config(None, [f"data.shards={whole}"])
    assert config.data.shards.reveal() == whole
    for text in (to_yaml(config), json.dumps(to_mapping(config)), repr(config), str(config)):
        assert "word" not in text
        assert "https://***@host/horse?sig=***" in text
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml").data.shards.lost_secret
    schema = TypeAdapter(Config).json_schema()
    assert schema["$defs"]["Data"]["properties"]["shards"] == {
        "default": "shards/toy", "title": "Shards", "type": "string"
    }  # fmt: skip
    (tmp_path / "number.yaml").write_text("data: {shards: 3}")
    with pytest.raises(UserError, match=r"data\.shards is 3; it must be a valid string"):
        load_config(tmp_path / "number.yaml")
    assert load_config(None, ["data.shards=2020"]).data.shards == "2020"


def test_whatever_is_printed_hides_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("weights https://user:word@host/w.pth: no such file")
    console.warn("retry of https://host/x?sig=word")
    console.say_plainly("https://user:word@host/x")
    said = capsys.readouterr()
    assert "word" not in said.out + said.err
    assert "https://***@host/w.pth" in said.out
