"""A folder of token shards of which only the index is there."""

from pathlib import Path

from src.data.fingerprint import fingerprint, write_json
from src.data.mapped.piece_table import SPLITS, PieceTable, Shard, shard_name
from src.data.shards import INDEX_FORMAT


def token_folder(folder: Path, pieces: int, tokens: int) -> None:
    """The index of so many pieces; no file of tokens is there."""
    shards = [
        {split: Shard(shard_name(number, split), 2 * tokens, tokens, 1, 9, 0, 7) for split in SPLITS}
        for number in range(pieces)
    ]
    table = PieceTable.of(shards)
    body = {"format": INDEX_FORMAT, "dtype": "uint16", "pieces": pieces, "crc32": table.write(folder)}
    body["fingerprint"] = table.fingerprint
    write_json(folder / "index.json", body | {"checksum": fingerprint(body)})
