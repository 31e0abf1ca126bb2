-- What is known of a shard beside the checkpoint of its passes, in JSON that names its version: the server, its memory, warnings,
-- what became of the touch, and the figures that have no column. NULL: written before this was kept.
ALTER TABLE shards ADD COLUMN report TEXT;
