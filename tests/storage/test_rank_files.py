"""Files of ranks: at most 1,024 in a folder, and found again by rank."""

from pathlib import Path

from src.storage.rank_files import folder_of, found


def test_no_folder_has_more_than_1024(tmp_path: Path) -> None:
    places = [folder_of(tmp_path, rank) for rank in range(16_384)]
    assert places[1023] == tmp_path, "as ever in small worlds"
    assert max(places.count(place) for place in set(places)) == 1024


def test_they_are_found_by_rank_whatever_lies_beside_them(tmp_path: Path) -> None:
    for rank in (1024, 3, 1023, 16_383, 10):
        folder_of(tmp_path, rank).mkdir(exist_ok=True)
        (folder_of(tmp_path, rank) / f"rank_{rank}.json").touch()
    for other in ("rank_x.json", "rank_7", "wanted", "rank_5.json.tmp"):
        (tmp_path / other).touch()
    assert list(found(tmp_path, ".json")) == [3, 10, 1023, 1024, 16_383]
    assert found(tmp_path, ".json")[1024] == tmp_path / "from_01024" / "rank_1024.json"
    assert list(found(tmp_path)) == [7]
