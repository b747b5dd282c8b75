"""What each layer needs of a file is known once the file was opened."""

import pytest
from restore_rig import RUN, STRATEGIES, Restorer


@pytest.mark.parametrize("codec", STRATEGIES)
def test_it_is_learnt_from_the_first_opening(tmp_path, codec) -> None:
    rig = Restorer(tmp_path, codec)
    ids = rig.store.adopt(rig.name, rig.tier.reopen(rig.name).entry, 0, RUN)
    segment = rig.store.get(int(ids[0]) >> 24)
    assert segment.layer_bytes is None
    unopened = rig.store.ledger.snapshot()["index"]
    rig.store.open(segment)
    assert segment.layer_bytes.tolist() == rig.codec.open(rig.payload).layer_bytes()
    learnt = rig.store.ledger.snapshot()["index"] - unopened
    assert learnt == segment.layer_bytes.nbytes
    segment.layer_bytes[:] = 0  # as if another codec's payload had been sealed here
    rig.store.open(segment)
    assert segment.layer_bytes.sum() == len(rig.payload)
    rig.store.release(ids)
    assert rig.store.ledger.snapshot()["index"] == 0
    rig.close()
