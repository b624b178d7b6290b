"""Seeds stay what they are for good: dropout, samples, first weights and the order of sequences come from them."""

from common.seeds import keys_of, seed_of


def test_seeds_are_the_first_bits_of_the_hash() -> None:
    assert seed_of("dropout 7 12 3") == 11600728094427878653
    assert seed_of("dropout 7 12 3", bits=63) == 5800364047213939326


def test_keys_are_the_numbers_of_the_longer_hash() -> None:
    keys = [
        9127890123998000126,
        3698543686253736203,
        17374271562076472172,
        2621279379135279278,
        13135610191162325350,
        4644022969345278284,
    ]
    assert keys_of("longhaul order 7 1", 6).tolist() == keys
    assert keys_of("longhaul order 7 1", 2).dtype == "uint64"
