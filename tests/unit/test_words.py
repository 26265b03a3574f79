"""What a word is in scripts without spaces and in scripts with combining marks, in every place that counts words."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.config.evaluation import RetrievalConfig
from rung.data.check import inspect_data
from rung.data.deduplication import fuzzy_duplicates, near_duplicates, prompt_words
from rung.data.records import Records
from rung.evaluation.retrieval import Bm25Index, Library, split_passages
from rung.scoring.words import plain_words, readable, search_words, tokens
from rung.types import Message, Record, Source

# Nine passages a script, invented, of one form and with most characters in common, and a question to each.
CHINESE = [("张明", "北京", "苹果"), ("李华", "上海", "香蕉"), ("王芳", "广州", "西瓜"), ("赵云", "深圳", "葡萄")]
CHINESE += [("陈静", "南京", "石榴"), ("刘洋", "天津", "樱桃"), ("杨雪", "重庆", "草莓"), ("周杰", "西安", "橙子")]
CHINESE += [("吴敏", "东京", "水梨")]
JAPANESE = [
    ("田中", "大阪", "りんご"),
    ("山田", "東京", "みかん"),
    ("中山", "京都", "ぶどう"),
    ("田村", "奈良", "すいか"),
]
JAPANESE += [
    ("村上", "神戸", "いちご"),
    ("上田", "札幌", "バナナ"),
    ("中村", "福岡", "メロン"),
    ("木村", "広島", "レモン"),
]
JAPANESE += [("高木", "仙台", "さくら")]
THAI = [("มานี", "เชียงใหม่", "มะม่วง"), ("ปิติ", "กรุงเทพ", "กล้วย"), ("ชูใจ", "ภูเก็ต", "ทุเรียน")]
THAI += [
    ("วีระ", "ขอนแก่น", "ส้มโอ"),
    ("สมชาย", "ลำปาง", "มังคุด"),
    ("สมหญิง", "พะเยา", "ลำไย"),
    ("อรุณ", "น่าน", "เงาะ"),
    ("จันทร์", "ตราด", "ฝรั่ง"),
]
THAI += [("ดวงใจ", "ระยอง", "แตงโม")]
KHMER = [("សុខា", "ភ្នំពេញ", "ស្វាយ")]
KHMER += [("ដារា", "សៀមរាប", "ចេក"), ("បុប្ផា", "បាត់ដំបង", "ធុរេន")]
KHMER += [("វិចិត្រ", "កំពត", "ម្រេច")]
KHMER += [("រតនា", "តាកែវ", "ក្រូច"), ("សុភា", "កែប", "ដូង"), ("មករា", "ពោធិ៍សាត់", "ល្ហុង"), ("ចន្ទា", "ក្រចេះ", "មៀន")]
KHMER += [("នារី", "រតនគិរី", "សាវម៉ាវ")]
HINDI = [("राम", "दिल्ली", "सेब"), ("सीता", "मुंबई", "केला"), ("मोहन", "कोलकाता", "आम"), ("गीता", "चेन्नई", "अंगूर")]
HINDI += [("सोहन", "पटना", "संतरा"), ("मीरा", "जयपुर", "अनार"), ("रमा", "लखनऊ", "पपीता"), ("मीना", "भोपाल", "लीची")]
HINDI += [("रीमा", "इंदौर", "नींबू")]
ARABIC = [
    ("أحمد", "القاهرة", "التفاح"),
    ("فاطمة", "دمشق", "الموز"),
    ("علي", "بغداد", "العنب"),
    ("مريم", "تونس", "التين"),
]
ARABIC += [
    ("خالد", "عمان", "الرمان"),
    ("ليلى", "بيروت", "البرتقال"),
    ("يوسف", "الرباط", "التمر"),
    ("هدى", "صنعاء", "الخوخ"),
]
ARABIC += [("سعيد", "الدوحة", "البطيخ")]
SCRIPTS = {
    "chinese": (CHINESE, "{0}住在{1},每天早上在市场上卖{2},大家都喜欢去。", "{0}每天卖什么?"),
    "japanese": (JAPANESE, "{0}さんは{1}に住んでいて、毎朝市場で{2}を売っています。", "{0}さんは何を売っていますか?"),
    "thai": (THAI, "{0}อาศัยอยู่ที่{1}และขาย{2}ที่ตลาดทุกเช้า", "{0}ขายอะไรที่ตลาด"),
    "khmer": (KHMER, "{0}រស់នៅ{1}ហើយលក់{2}នៅផ្សាររាល់ព្រឹក។", "{0}លក់អ្វីនៅផ្សារ?"),
    "hindi": (HINDI, "{0} {1} में रहता है और हर सुबह बाज़ार में {2} बेचता है।", "{0} बाज़ार में क्या बेचता है?"),
    "arabic": (ARABIC, "يسكن {0} في {1} ويبيع {2} في السوق كل صباح.", "ماذا يبيع {0} في السوق؟"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_right_passage_is_first_in_every_script(script: str) -> None:
    """Of nine Chinese questions none found its passage: a clause was one word."""
    rows, sentence, question = SCRIPTS[script]
    passages = [sentence.format(*row) for row in rows]
    index = Bm25Index([search_words(passage) for passage in passages])
    first = [index.best(search_words(question.format(*row)), 1) for row in rows]
    assert first == [[i] for i in range(9)]
    # the hit rate of a run, judged by answers that stand in the passages
    config = RetrievalConfig(documents="d", top_k=1)
    library = Library.from_documents(passages, config, "d")
    records = [
        Record((Message("user", question.format(*row)), Message("assistant", row[2])), Source("q", i))
        for i, row in enumerate(rows)
    ]
    assert library.hit_rate(records)["hits"] == 9


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_those_of_before(text: str) -> None:
    before = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    assert search_words(text) == plain_words(text) == before
    assert readable(before) == " ".join(before)
    assert split_passages(text, 3, 1) == spaced_passages(text, 3, 1)


def spaced_passages(text: str, size: int, overlap: int) -> list[str]:
    """`split_passages` by white space alone."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    if len(spans) <= size:
        return [text.strip()] if spans else []
    starts = [*range(0, len(spans) - size, size - overlap), len(spans) - size]
    return [text[spans[start][0] : spans[start + size - 1][1]] for start in starts]


def test_marks_stay_with_their_letters() -> None:
    assert search_words("हिन्दी में लिखो") == ["हिन्दी", "में", "लिखो"]
    assert search_words("كَتَبَ الوَلَدُ") == ["كَتَبَ", "الوَلَدُ"]
    assert search_words("שָׁלוֹם עולם") == ["שָׁלוֹם", "עולם"]
    assert search_words("cafe\u0301 été") == ["café", "été"]
    assert search_words("می\u200cروم") == ["میروم"]  # a joiner only shapes the word
    assert search_words("ที่ดี") == ["ที่ดี"] and search_words("ที่ดีมาก") == ["ที่ดี", "ดีม", "มา", "าก"]


def test_pairs_of_characters_and_what_stands_between() -> None:
    assert search_words("北京市有Tesla Model3车2024年") == [
        *("北京", "京市", "市有", "tesla", "model3", "车", "2024", "年"),
    ]
    assert search_words("猫 狗") == ["猫", "狗"] and search_words("カタカナ") == ["カタ", "タカ", "カナ"]
    assert search_words("ｶﾞ") == search_words("ガ") == ["ガ"]
    assert search_words("๒๕๖๗ปี") == ["๒๕๖๗", "ปี"]  # a number is one word
    assert search_words("မြန်မာ") == ["မြန်", "န်မာ"]
    assert plain_words("北京 Tesla") == ["北", "京", "tesla"]
    assert tokens("ที่ดี") == ("ที่", "ดี")


@pytest.mark.parametrize("text", ["北京市有 Tesla 车和猫", "a b", "猫", "", "今天天气很好很好", "ที่ดีมาก ๆ"])
def test_pairs_read_as_their_text(text: str) -> None:
    assert readable(search_words(text)).replace(" ", "") == "".join(plain_words(text))


def test_a_document_without_spaces_is_cut_into_passages() -> None:
    """It was one passage, whatever `chunk_words`."""
    text = "".join(f"第{i}句话说明一件事情。" for i in range(60))
    passages = split_passages(text, 50, 10)
    assert len(passages) > 5 and all(len(plain_words(passage)) <= 60 for passage in passages)
    assert all(any(passage in text for _ in (0,)) for passage in passages) and passages[0][0] == "第"
    covered = set()
    for passage in passages:
        start = text.index(passage)
        covered |= set(range(start, start + len(passage)))
    assert covered == set(range(len(text)))
    mixed = split_passages("abc 北京。def", 2, 0)
    assert mixed == ["abc 北", "京。def"]


def record(text: str, line: int) -> Record:
    return Record((Message("user", text), Message("assistant", "a")), Source("d", line))


def test_near_duplicates_in_scripts_without_spaces() -> None:
    """A clause was one word, so that no n-gram of eight words was ever shared."""
    shared = "小明今天早上在学校门口捡到一个红色的钱包然后交给老师"
    train = Records.from_records([record(f"问题:{shared},他做得对吗?", 1)])
    held_out = Records.from_records([record(f"请看,{shared}!", 2), record("完全不同的另一个故事讲的是一只猫", 3)])
    (match,) = near_duplicates(train, held_out, 13)
    assert match.held_out == "d line 2" and match.matched == shared and match.containment > 0.8
    copies = Records.from_records([record(f"问题:{shared},他做得好吗?", 4)])
    (fuzzy,) = fuzzy_duplicates(train, copies)
    assert fuzzy.jaccard > 0.6 and " " not in fuzzy.text.split()[1]


def test_hindi_words_are_not_cut_at_their_vowels() -> None:
    assert prompt_words(record("मेरी किताब कहाँ है?", 1)) == ["मेरी", "किताब", "कहाँ", "है"]


def test_diversity_counts_words_of_every_script(tmp_path: Path) -> None:
    answers = ["今天天气很好", "今天天气不好", "明天天气很好"]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"question": f"q{i}", "answer": a}) + "\n" for i, a in enumerate(answers)))
    diversity = inspect_data(str(file)).diversity
    assert diversity is not None
    pairs = [answer[i : i + 2] for answer in answers for i in range(5)]
    assert diversity.distinct_1 == pytest.approx(len(set(pairs)) / len(pairs))
