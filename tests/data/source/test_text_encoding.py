"""Caption files of other encodings: decoded where there is no doubt, otherwise refused by name."""

from __future__ import annotations

import pytest
from chroma_trainer.trainer_core.data.source.folder import FolderBackend
from chroma_trainer.trainer_core.data.source.text_encoding import (
    UnreadableText,
    decode_unicode,
    encoding_of,
    is_western,
)

CAPTIONS = {
    "gb18030": ["一只红色的猫", "红发, 女孩, solo, 1girl", "一个年轻女子站在海边，穿着白色连衣裙", "蓝色的眼睛, 长发"],
    "big5": ["一隻紅色的貓", "紅髮, 女孩, solo", "一個年輕女子站在海邊，穿著白色連衣裙", "藍色的眼睛, 長髮"],
    "cp932": ["赤い猫の写真", "女の子, solo, long hair", "青い空の下で、少女が笑っている", "森の中の小屋、雪山"],
    "cp949": ["빨간 고양이 사진", "소녀, solo, 긴 머리", "푸른 하늘 아래 소녀가 웃고 있다", "숲 속의 오두막"],
    "cp1251": [
        "красная кошка на окне",
        "девушка стоит у моря в белом платье",
        "улица города на закате",
        "голубые глаза",
    ],
    "koi8_r": [
        "красная кошка на окне",
        "девушка стоит у моря в белом платье",
        "улица города на закате",
        "голубые глаза",
    ],
    "cp1252": [
        "ein Kätzchen, größer",
        "a cat’s “paw” – photo…",
        "Édouard Manet, œuvre créée à côté",
        "niño, ¿qué? 30°C",
    ],
}


@pytest.fixture
def folder(tmp_path):
    def write(captions):
        for number, raw in enumerate(captions):
            (tmp_path / f"{number}.png").write_bytes(b"x")
            (tmp_path / f"{number}.txt").write_bytes(raw)
        return FolderBackend(tmp_path)

    return write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_unicode_of_every_editor(encoding):
    assert decode_unicode("ein Kätzchen, größer".encode(encoding)) == "ein Kätzchen, größer"


@pytest.mark.parametrize("encoding", CAPTIONS)
def test_the_captions_of_a_folder_tell_its_encoding(folder, encoding):
    texts = CAPTIONS[encoding]
    backend = folder([text.encode(encoding) for text in texts])
    assert [backend.caption_text(f"{n}.png")[0] for n in range(len(texts))] == texts
    assert backend.encodings == {encoding: len(texts)}


@pytest.mark.parametrize("encoding", CAPTIONS)
@pytest.mark.parametrize("number", range(4))
def test_a_single_caption_is_decoded_rightly_or_refused(folder, encoding, number):
    text = CAPTIONS[encoding][number]
    backend = folder([text.encode(encoding)])
    try:
        assert backend.caption_text("0.png")[0] == text
    except UnreadableText as error:
        assert str(error) == "is not UTF-8, and its encoding can't be told for sure; save it as UTF-8"


def test_unicode_captions_beside_others_are_not_guessed(folder):
    backend = folder(["赤い猫".encode(), *(text.encode("gb18030") for text in CAPTIONS["gb18030"])])
    assert backend.caption_text("0.png")[0] == "赤い猫"
    assert backend.caption_text("1.png")[0] == "一只红色的猫"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (bytes(range(256)), "contains NUL bytes"),
        (b"a red\0 cat", "contains NUL bytes"),
        (b"\x89PNG\r\n\x1a\n\x01\x02", "its encoding can't be told"),
        (b"\x01\x02\x03 cat", "contains control characters"),
        (b"\xff\xfea", "is damaged: it is not valid UTF-16"),
        (b"x" * (2 << 20), "is 2 MiB in size; the limit is 1 MiB"),
    ],
)
def test_what_is_no_caption_is_refused(folder, raw, reason):
    with pytest.raises(UnreadableText, match=reason):
        folder([raw]).caption_text("0.png")


@pytest.mark.parametrize("text", ["naïve", "a café", "cat’s", "À l’œuvre", "© 2020, 30°", "n°1 — «oui»"])
def test_western_captions_are_read_as_before(text):
    assert is_western(text.encode("cp1252")) and encoding_of([text.encode("cp1252")]) == "cp1252"


def test_without_charset_normalizer_only_western_text_is_sure(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "charset_normalizer", None)
    assert encoding_of(["größer".encode("cp1252")]) == "cp1252"
    assert encoding_of([text.encode("gb18030") for text in CAPTIONS["gb18030"]]) == ""
