"""The letters of the languages that old encodings were made for, the frequent ones first: data of
core.text_encoding. The signs are those that captions and everyday texts use most.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

# One letter in how many: natural logarithms, by which encodings are compared.
ASCII = 3.0
FIRST_SIGN, LAST_SIGN = 4.5, 6.8            # of the listed Chinese, Japanese and Korean signs
RARE_SIGN = 14.0                            # one beyond the common half of its standard
KANA = 3.6
OTHER = 12.0


@dataclass(frozen=True, slots=True)
class Language:
    """What texts in one encoding and one language, or one group of them, are made of."""

    codec: str
    rarity: float                           # what it costs to be in this language at all
    letters: dict[str, float]
    common: frozenset[str] = field(default_factory=frozenset)   # signs that cost `plain`
    plain: float = 0.0
    vowels: str = ""                        # of an alphabet whose words all have one
    latin: bool = False                     # its letters stand beside those of ASCII
    other: float = OTHER                    # any other letter


_PUNCTUATION = {"’": 3.0, **dict.fromkeys("“”‘–—…„", 4.5),
                **dict.fromkeys("\xa0«»°½×€£©®™·¿¡§ªº№", 6.0)}
_WIDE_PUNCTUATION = {**dict.fromkeys("，。、", 3.5),
                     **dict.fromkeys("（）「」『』《》！？：；“”‘’…—·　～", 5.0)}


_LATIN_VOWELS = "aeiouyäöüéèáàóíêâúôîåøæûïëãõìòùœýÿąęěůőűıăėųįūāīē"


def _alphabet(codec: str, rarity: float, order: str, first: float = 3.0, step: float = 0.1,
              vowels: str = "", latin: bool = True) -> Language:
    costs = {letter: first + step * rank for rank, letter in enumerate(order)}
    # Café and its like are at home everywhere.
    lower = ({"é": 5.0} if latin else {}) | costs
    upper = {letter.upper(): cost + 1.5 for letter, cost in lower.items()
             if len(letter.upper()) == 1}
    return Language(codec, rarity, _PUNCTUATION | upper | lower, latin=latin,
                    vowels=vowels or _LATIN_VOWELS * latin)


def _signs(codec: str, rarity: float, order: str, common: frozenset[str], plain: float,
           kana: bool = False) -> Language:
    order = "".join(dict.fromkeys(order.replace("\n", "")))
    step = (LAST_SIGN - FIRST_SIGN) / len(order)
    letters = {sign: FIRST_SIGN + step * rank for rank, sign in enumerate(order)}
    if kana:
        letters |= {chr(code): KANA for code in (*range(0x3041, 0x3094), *range(0x30a1, 0x30f7),
                                                 0x30fc)}
    return Language(codec, rarity, _WIDE_PUNCTUATION | letters, common, plain, other=RARE_SIGN)


def _half(encoding: str, first: range, last: range) -> frozenset[str]:
    """The signs of the rows that a standard filled with the more frequent ones."""
    pairs = (bytes((row, column)) for row in first for column in last)
    return frozenset("".join(pair.decode(encoding, "ignore") for pair in pairs))


_BOTH = """
的一不了人在有我他中上大和地到以出可也你生能而子得自之年下用道行然家成方多去如都同天分好小部其主心
前本因只想日手十民工使情明性知全三正外高最重向文政美相被利二等或新己果加西斯月合回特代信表化老位次
常先海通教原立及比水名真走各入口平反受目太量再感建做接必件期市直德山金指格支住至便空形社治展科司五
基眼白非光放像快且思王完色品告求死交取拉共清今切候千林木花草房女男站坐身背景黑戴穿臉石朵牛羊米火土
耳尖影服毛衣帽布床夜晚雨雪星幅油墨彩描插半左右近拍照物笑微古典裝側仰低俯抱拿握舉跑跳睡躺舞吃喝看牆
河湖岸夕夏冬春秋杯瓶籃碗刀劍盔甲公武士巫婆式簡潔柔亮溫暗淡粉紫橙棕灰青藍銀豹狐狸鹿虎狼熊豬雞鴨兔鼠
蛇鯨肖
"""
_SIMPLE = """
这个们来为国说时会对过发后里样经么学现当没动面还进定从实军者无力它与长把机第此已两间由问很物并应战
头体见什产给话内世任门儿东声提员解论处走义条认气题活尔更别打变四神总何电数安少报才结场计管资命许统
区保队决马书则听却界达强即难权象设记路类据北边张该规万望觉术领确传师观让识带导争运猫狗蓝红绿黄脸嘴
腿裙裤鞋帽窗户树云车鸟鱼龙风画图片质线单双独简约银短卷穿着孩姑娘年睛鼻脚颜衬衫连衣披肩辫尾刘海眉唇
胡须眼镜耳环项链围巾手套礼服制校泳装和旗袍汉古水墨素写漫卡通细节杰作高清摄影室城街桌椅灯阳夜空滩森
湖船飞桥楼建筑咖啡苹果杯狐猴鸡猪兔剑铠仙魔法士骑兵器乐吉他钢琴篮球足跳舞唱歌笑哭怒惊害羞看向众躺跪
蹲举抱握拿闭开只
"""
_TRADITIONAL = """
這個們來為國說時會對過發後裡樣經麼學現當沒動面還進定從實軍者無力它與長把機第此已兩間由問很物並應戰
頭體見什產給話內世任門兒東聲提員解論處走義條認氣題活爾更別打變四神總何電數安少報才結場計管資命許統
區保隊決馬書則聽卻界達強即難權象設記路類據北邊張該規萬望覺術領確傳師觀讓識帶導爭運貓狗藍紅綠黃髮臉
嘴腿裙褲鞋帽窗戶樹雲車鳥魚龍風畫圖片質線單雙獨簡約銀短捲穿著孩姑娘年睛鼻腳顏襯衫連衣披肩辮尾劉海眉
唇鬍鬚眼鏡耳環項鍊圍巾手套禮服制校泳裝和旗袍漢古水墨素寫漫卡通細節傑作高清攝影室城街桌椅燈陽夜空灘
森湖船飛橋樓建築咖啡蘋果杯狐猴雞豬兔劍鎧仙魔法士騎兵器樂吉他鋼琴籃球足跳舞唱歌笑哭怒驚害羞看向眾躺
跪蹲舉抱握拿閉開隻傍廟籠楓咪堡脈朵亞態優雅復刻遠近灣臺島閣宮殿瀑霧靄濕潤憂鬱興奮溪塵鑽閃爍
"""
_KANJI = """
人一日大年出本中子見国言上分生手自行者二間事思時気会十家女三前的方入小地合後目長場代私下立部学物月
田何来彼話体動社知理山内同心発高実作当新世今書度明五戦力名金性対意用男主通関文屋感郎業定持道外所現
最化四先民身不口川東相多法全聞情野考向平成軍開教経信近以語面連問原顔正機美回表声報変神記和引治決太
受解市期様活頭組指説能葉流然初足円在電色西選髪猫犬青赤緑黄黒白服着帽笑背景空海花木夜雪雨少娘姿座歩
走制夏冬春秋森林湖街桜傘窓眼鏡短銀茶紫桃灰絵画風線水彩油写真光影朝夕星雲火石馬鳥魚竜虎狐狼兎
"""
_HANGUL = """
이다는에가을의고하은를한지로아기사어리인도자나서그시라대게들해니있스수여일부만정보전으마상과제장것
우오구주선비소동무안려성조공문위모었생았세야원신경적미국거학등내러면관없머눈양강란빨간검얗초록색옷
드레배늘바꽃웃앉녀남처림진밝빛밤낮별달물산길집창책차말새개토끼호랑곰긴짧단발금갈파노분홍회흰흑백입
코귀손팔얼굴치셔츠교복두풍화타애실외숲변겨울봄름왕역광궁궐녁침곱슬묵유필질벚옆뒤왼른쪽걸목톱떠걷뛰
릴누워잠꿈숨쉬먹읽쓰듣픈행쁜엽멋큰작높넓좁맑흐햇살저점심식탁병촛불램프명루엣릿감터붓펜채텔톤따뜻운
몽환판중근현재골버택와옥절탑돌담벽천막텐트캠핑축결혼졸업티
"""

@functools.cache
def languages() -> tuple[Language, ...]:
    """All of them; made when a text asks that is not UTF-8."""
    big5_half, gb_half = _half("big5", range(0xa4, 0xc7), range(0x40, 0xff)), _half(
        "gb2312", range(0xb0, 0xd8), range(0xa1, 0xff))
    jis_half, ks_half = _half("cp932", range(0x88, 0x99), range(0x40, 0xfd)), _half(
        "euc_kr", range(0xb0, 0xc9), range(0xa1, 0xff))
    return (
        _alphabet("cp1252", 0, "äüöß"),                                 # German
        _alphabet("cp1252", 0, "éèàêçâîôûïëùœæüñ"),                     # French, Catalan
        _alphabet("cp1252", 0, "íóáéñúü"),                              # Spanish
        _alphabet("cp1252", 0.5, "ãçáéíóõêâúàôü"),                      # Portuguese
        _alphabet("cp1252", 0.5, "àèéìòùî"),                            # Italian
        _alphabet("cp1252", 0.5, "äåöøæéüë"),                           # the north, Dutch
        _alphabet("cp1252", 3, "áéíóúýðþæö"),                           # Icelandic
        _alphabet("cp1250", 4.5, "ąęłóśżćńź"),                            # Polish
        _alphabet("cp1250", 4.5, "íáéěčřšžýůúťďňóľôĺŕäđć", vowels="aeiouyáéěíóúůýôäřrl"),
        _alphabet("cp1250", 4.5, "áéöőüóíúű"),                            # Hungarian
        _alphabet("cp1250", 5, "ăîâşţ"),                                # Romanian
        _alphabet("cp1254", 3.5, "ıüşçöğâîû"),                          # Turkish
        _alphabet("cp1257", 7.5, "ėšžųąčįęūāīēļņģķõäöü"),                  # the Baltic
        *(_alphabet(codec, rarity, "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё" + more, 2.2, 0.07,
                    "аеёиоуыэюяіїє", latin=False)
          for codec, rarity, more in (("cp1251", 1.5, "іїєґў"), ("cp866", 6, ""))),
        _alphabet("cp1253", 3, "αοιετσνηυρπκμλςωδγχθφάίόέήύώβξζψϊϋ", 2.2, 0.07,
                  "αοιεηυωάίόέήύώϊϋ", latin=False),
        _alphabet("cp1256", 4, "اليمنوةتربعدسفهكقحجشصخطغذثزضىءأإؤئآ", 2.2, 0.07,
                  latin=False),                                         # Arabic
        _alphabet("cp874", 4, "านรอกเงมยลวดทสตะปบคหแจพชขใไโผซถศฟ่้ิีึืุูั็์ำๆ", 2.2, 0.07,
                  latin=False),                                         # Thai
        _signs("gb18030", 0, _SIMPLE + _BOTH, gb_half, 8.5),
        _signs("cp932", 1, _KANJI, jis_half, 10, kana=True),
        _signs("big5", 0.5, _TRADITIONAL + _BOTH, big5_half, 9),
        _signs("cp949", 0.5, _HANGUL, ks_half, 9),
        _signs("euc_jp", 8, _KANJI, jis_half, 10, kana=True),
        # UTF-8 with a broken place: the signs are sure, what is broken is dear.
        Language("utf-8-broken", 4, {"\ufffd": 14.0}, other=4.0),
    )


TITLES = {"cp1252": "Windows-1252", "cp1250": "Windows-1250", "cp1251": "Windows-1251",
          "cp1253": "Windows-1253", "cp1254": "Windows-1254", "cp1256": "Windows-1256",
          "cp1257": "Windows-1257", "cp874": "Windows-874", "cp866": "CP866",
          "gb18030": "GB18030", "cp932": "Shift_JIS", "big5": "Big5",
          "cp949": "CP949", "euc_jp": "EUC-JP",
          "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "utf-32": "UTF-32"}
