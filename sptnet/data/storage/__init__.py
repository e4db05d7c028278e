"""Where shards lie: in a folder, or behind a URL and then for a while on a node's disk.

    store         a dataset, in a folder or remote    remote      fetching with retries
    cache         fetched files on a node's disk      fetch_ahead fetches that nobody waits for
    pieces        samples of shards still to come, fetched by range

Begin with `store.py`.
"""
