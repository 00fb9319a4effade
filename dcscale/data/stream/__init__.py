"""From shards to batches.

:mod:`order <dcscale.data.stream.order>` and :mod:`mixture <dcscale.data.stream.mixture>` plan where each sequence is in
the shuffle blocks of one or several sources. :mod:`block_reader <dcscale.data.stream.block_reader>` prefetches blocks,
which :mod:`block_builder <dcscale.data.stream.block_builder>` makes from shards; :mod:`lookahead
<dcscale.data.stream.lookahead>` decides which ones. :mod:`sequences <dcscale.data.stream.sequences>` cuts them into
sequences. :mod:`stream <dcscale.data.stream.stream>` combines these, and :mod:`loader <dcscale.data.stream.loader>`
makes batches, in the process itself or in :mod:`workers <dcscale.data.stream.workers>`.
"""
