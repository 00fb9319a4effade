"""From text to shards.

:mod:`build <dcscale.data.prepare.build>` finds the :mod:`sources <dcscale.data.prepare.sources>`, reads their
:mod:`documents <dcscale.data.prepare.documents>`, tokenizes them in a :mod:`pool <dcscale.data.prepare.pool>` of
processes, writes them to shards in :mod:`shuffled <dcscale.data.prepare.shuffle>` order and keeps a
:mod:`journal <dcscale.data.prepare.journal>` to resume an interrupted build from.
:mod:`inspect <dcscale.data.prepare.inspect>` verifies shards, and :mod:`index <dcscale.data.prepare.index>` writes a
manifest for tars made by other tools.
"""
