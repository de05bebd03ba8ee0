import pytest

from biomedclip.tokens import END_ID, START_ID, clean_caption, count_tokens, encode_captions

CAPTIONS = [
    "Chest X-ray showing a right lower lobe opacity.",
    "Figure 2. TGF-β1 induces α-SMA (10^4 cells/mL; p<0.05) &amp; collagen.",
    "it's  don't WE'LL they're I'd I'm you've",
    "Größe µm  naïve — café…\n\t x ﬁbrosis",
    "漢字 и кириллица 😀 ١٢٣ ſtrange İ ŉ ǅ",
    "a<b & c>d &lt;b&gt; &amp;lt;",
    "1234567890 x^2 H₂O m² 37 °C ±0.5 ‰",
    "",
    "   ",
    "word " * 200,
]


@pytest.mark.parametrize("length", [16, 77])
def test_ids_are_those_of_open_clip(length):
    import open_clip

    theirs = open_clip.get_tokenizer("ViT-B-32", context_length=length)(CAPTIONS).tolist()
    assert encode_captions(CAPTIONS, length).tolist() == theirs


def test_special_tokens_written_in_a_caption_are_text():
    ids = encode_captions(["<end_of_text>"])[0].tolist()
    assert ids[0] == START_ID
    assert END_ID not in ids[1:3]


def test_counting_leaves_start_and_end_out():
    assert count_tokens("") == 0
    assert count_tokens("chest x-ray") == len([i for i in encode_captions(["chest x-ray"])[0] if i]) - 2


def test_cleaning_resolves_entities_twice_and_folds_space():
    assert clean_caption(" A&amp;amp;B\n C ") == "a&b c"
