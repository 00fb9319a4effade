"""From shards to batches.

:mod:`order <dcscale.data.stream.order>` says where every sequence is, :mod:`block_reader
<dcscale.data.stream.block_reader>` reads the shards that it takes, :mod:`block_builder
<dcscale.data.stream.block_builder>` shuffles their documents, :mod:`sequences <dcscale.data.stream.sequences>` cuts
them; :mod:`stream <dcscale.data.stream.stream>` puts these together, :mod:`mixture <dcscale.data.stream.mixture>` takes
several streams, and :mod:`loader <dcscale.data.stream.loader>` makes batches, with or without :mod:`workers
<dcscale.data.stream.workers>`.
"""
