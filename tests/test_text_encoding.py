"""Texts in the code pages of their countries come back, or are told as doubtful; UTF-8 always."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.text_encoding import Decoder, decode_text, read

CHINESE = "一只红色的猫，水墨画，café"

# By encoding: captions as people write them, single words among them.
TEXTS = {
    "cp1252": [
        "it’s raining, don’t stop", "the artist’s style, a woman’s hat",
        "“a smiling girl”, 1990’s", "a portrait of Loïc, garçon",
        "mädchen in grüner jacke, straße", "Straße", "Käse", "größer", "süß", "Ölgemälde",
        "Über den Wolken", "größe_xy", "ein schönes Haus am Fluss, Spätherbst",
        "blaue Augen, lange Röcke", "Ein Mann hört Musik, während es dämmert", "Fuß", "grün",
        "très", "forêt", "élève", "où", "crème brûlée", "fenêtre ouverte, lumière dorée",
        "une île", "fille aux cheveux roux, yeux bleus, forêt d’automne", "à la plage",
        "un café noir, 20°", "deux cœurs", "l’été à la mer", "chêne, bûche, fraîche", "niña",
        "NIÑA", "año", "corazón", "una niña pequeña con sombrero rojo", "señor mayor en el jardín",
        "¿qué es? ¡un búho!", "São Paulo", "coração", "menina não sorrindo", "perché no, città",
        "smørrebrød", "blå øyne, rød kjole", "Zoë"],
    "cp1251": [
        "кот", "девушка", "лес", "дом", "я", "да", "Москва", "ГОРОД", "акварель",
        "чёрный кот на окне", "портрет девушки, синие глаза", "девочка в красном платье, 1girl",
        "зима, снег, ночь", "старик сидит у моря", "рыжая лиса", "ёлка", "мальчик",
        "Улыбка, крупный план"],
    "cp1253": [
        "γάτα", "κορίτσι με κόκκινο φόρεμα", "θάλασσα, ουρανός", "ένας σκύλος στο δρόμο"],
    "cp932": [
        "女の子", "猫", "少女", "海", "青い髪の女の子、笑顔", "1girl, 黒髪", "セーラー服",
        "夕焼け", "メイド", "学校の制服を着た少女", "桜", "水彩画", "赤い傘を持つ女性",
        "金髪、碧眼", "犬と猫", "魔法使い", "アニメ風", "窓辺に座っている猫。", "山と川",
        "古い町並み、雨"],
    "cp949": [
        "고양이", "여자", "소녀", "바다", "봄", "꽃", "강아지", "파란 머리의 소녀", "웃는 얼굴",
        "긴 머리", "교복을 입은 소녀", "수채화 스타일", "빨간 드레스를 입은 여자", "밤하늘의 별",
        "창가에 앉아 있는 고양이", "LoRA를 위한 사진", "안경을 쓴 남자",
        "벚꽃 아래의 검객", "궁궐, 저녁, 산"],
    "gb18030": [
        "女孩", "猫", "狗", "龙", "花", "少女", "一只猫", "小猫", "一些", "一只sks猫", "猫，一只",
        "脸", "媚", "微笑", "长发", "山水", "蓝色头发", "1girl, 蓝色头发",
        "一个穿红色连衣裙的女孩站在海边", "水墨画风格", "春天", "一只红色的猫，水墨画",
        "白色背景，高质量", "夜晚的城市街道", "赛博朋克", "樱花树下的少女", "机甲", "穿T恤的男孩",
        "短发，校服，双马尾", "窗台上的猫咪在晒太阳", "吉卜力风格的乡村小屋", "宇航员"],
    "big5": [
        "女孩", "貓", "花", "龍", "微笑", "長髮", "山水", "藍色頭髮",
        "一個穿紅色連衣裙的女孩站在海邊", "一隻貓", "水墨畫風格", "白色背景，高品質",
        "夜晚的城市街道", "櫻花樹下的少女", "龐克", "穿T恤的男孩", "宇航員",
        "窗台上的貓咪在曬太陽"],
    "cp1250": [
        "dívka s červenými vlasy", "dziewczyna w niebieskiej sukience, długie włosy",
        "příliš žluťoučký kůň", "szép lány, hosszú haj, őszi erdő"],
    "cp1254": [
        "güneşli gün", "mavi gözlü kız, uzun saçlı", "ağaç"],
    "cp1256": ["قطة تجلس على السرير", "فتاة", "لوحة زيتية, بحر"],
    "cp866": ["девушка в красном платье", "кот сидит на столе", "зима, снег"],
    "cp874": ["ผู้หญิงสวย ยิ้ม", "แมวสีขาว", "เด็กผู้หญิง, ผมยาว"],
}
EACH = [(encoding, text) for encoding, texts in TEXTS.items() for text in texts]


def test_a_text_alone_comes_back_or_is_told() -> None:
    readings = [(encoding, text, read(text.encode(encoding))) for encoding, text in EACH]
    assert [(encoding, text, reading.text) for encoding, text, reading in readings
            if reading.text != text and not reading.doubt] == []


@pytest.mark.parametrize("encoding", TEXTS)
def test_most_texts_are_read_without_a_doubt(encoding: str) -> None:
    """Valid UTF-8 by chance is told, and is no doubt that a better judgement could clear."""
    readings = [(read(data), text) for text in TEXTS[encoding]
                if not is_utf8(data := text.encode(encoding))]
    sure = [reading.text == text and not reading.doubt for reading, text in readings]
    assert sum(sure) > 0.7 * len(sure)


@pytest.mark.parametrize("encoding", TEXTS)
def test_a_folder_is_read_as_one(encoding: str) -> None:
    files = [text.encode(encoding) for text in TEXTS[encoding]]
    decoder = Decoder(files)
    for text, data in zip(TEXTS[encoding], files, strict=True):
        reading = decoder.read(data)
        assert (reading.text, reading.doubt) == (text, False) or is_utf8(data)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_few_of_a_language_come_back_or_are_told(data: st.DataObject) -> None:
    encoding = data.draw(st.sampled_from(sorted(TEXTS)))
    texts = data.draw(st.lists(st.sampled_from(TEXTS[encoding]), min_size=1, max_size=4))
    joined = ", ".join(texts)
    reading = read(joined.encode(encoding))
    assert reading.text == joined or reading.doubt
    assert read(joined.encode()).text == joined


def test_utf_8_is_utf_8() -> None:
    """Alone, and among files of another encoding."""
    decoder = Decoder(one.encode("gb18030") for one in TEXTS["gb18030"])
    for text in [*(text for _, text in EACH), "café в Москве", "crème brûlée, кафе", "Zoë, Дима",
                 "naïve Ελλάδα style", "é", "Ñandú, кот", "חתול «שחור»", "قطة", "cafe\u0301",
                 "con mèo", "猫 café", "🐈 kočka", "România, șarpe"]:
        assert read(text.encode()).text == decoder.read(text.encode()).text == text


@settings(deadline=None)
@given(st.text().filter(lambda text: "\0" not in text and not text.startswith("\ufeff")))
def test_any_utf_8_is_utf_8(text: str) -> None:
    assert read(text.encode()).text == text
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert decode_text(text.encode(encoding)) == text


@pytest.mark.parametrize("text", ["кошка, Ёлка", "un café à côté", "naïve Ελλάδα style", "кафе",
                                  "crème brûlée, кафе", "γάτα", "חתול", "ein Bär"])
def test_plain_utf_8_is_in_no_doubt(text: str) -> None:
    assert not read(text.encode()).doubt


@pytest.mark.parametrize("text", ["一只猫", "微笑", "山水", "一些", "猫"])
def test_chinese_that_is_utf_8_by_chance_is_told(text: str) -> None:
    reading = read(text.encode("gb18030"))
    assert (reading.encoding, reading.doubt) == ("utf-8", True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030"])
def test_every_encoding_is_read(encoding: str) -> None:
    assert decode_text(CHINESE.encode(encoding)) == CHINESE


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["\ufeff猫 cat", "a cat,\n黑猫", "кот, cat"])
def test_utf_16_of_both_byte_orders(encoding: str, text: str) -> None:
    assert decode_text(text.encode(encoding)).lstrip("\ufeff") == text.lstrip("\ufeff")


@pytest.mark.parametrize("data", [
    bytes(range(256)), b"\x89PNG\r\n\x1a\n\0\0", b"\xff\xfe\x00", b"\xef\xbb\xbf\xff",
    b"\x81\x98\xdb\xb2\xff", "猫".encode("utf-16-le") + b"\0\0", b"a cat\0", b"\0\0\0\0"])
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the reason depends on the data
        decode_text(data)


@pytest.mark.parametrize("cut", [1, 2])
def test_utf_8_that_was_cut_is_told(cut: int) -> None:
    """As by a program that keeps the first 255 bytes."""
    reading = read("一个穿红色连衣裙的女孩站在海边".encode()[:-cut])
    assert reading.text.startswith("一个穿红色连衣裙的女孩站在海")
    assert reading.doubt
    assert reading.title == "UTF-8"


@pytest.mark.parametrize(("text", "encoding"), [
    ("ä", "cp1252"), ("а", "cp1251"), ("貓", "big5"), ("봄", "cp949"), ("лес", "cp1251"),
    ("mergaitė su skrybėle, žalias", "cp1257"), ("ילדה עם כובע", "cp1255")])
def test_what_could_be_two_encodings_is_told(text: str, encoding: str) -> None:
    assert read(text.encode(encoding)).doubt


@pytest.mark.parametrize("text", ["output_name: 水墨", "dir: D:/图片/猫", "# 一些\na: 1"])
def test_a_short_config_of_a_chinese_windows(text: str) -> None:
    """Its bytes are valid UTF-8 by chance, and there is nobody to ask."""
    assert decode_text(text.encode("gb18030")) == decode_text(text.encode()) == text
    assert decode_text("output_name: Zoë, кот, é".encode()) == "output_name: Zoë, кот, é"


def test_a_config_in_doubt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Windows-1252 or another encoding; save it as UTF-8"):
        decode_text("output_name: ä".encode("cp1252"))


def test_files_of_two_countries_in_one_folder() -> None:
    """A clear text in another encoding stays what it is, whatever the others say."""
    german, chinese = "mädchen in grüner jacke, straße".encode("cp1252"), [
        text.encode("gb18030") for text in TEXTS["gb18030"]]
    reading = Decoder([german, *chinese]).read(german)
    assert reading.text == "mädchen in grüner jacke, straße"
    # What could be both is what the others are: alone, this is Big5.
    assert read("貓".encode("big5")).text == "貓"
    assert Decoder(text.encode("big5") for text in TEXTS["big5"]).read(
        "龍".encode("big5")).doubt is False


def is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode("utf-8")) or True
    except UnicodeDecodeError:
        return False
