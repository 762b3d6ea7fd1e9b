"""From files to batches.

`schema` (the normal form of rows) <- `upstream` (records as rows) <- `sources` (where rows come from), `tokenizer` and
`templates` (text to ids) <- `examples` (rows as ids) <- `batches` (ids to batches by step) <- `inspect` (looking at them).
Import the modules; this package itself imports nothing, so that a tokenizer can be had without the dataset libraries.

    rows = sources.load("hh_rlhf", "train", path="harmless-base", data_dir="prepared", drop=["early_divergence"])
    lengths = examples.LengthPolicy((256, 512), max_prompt=384, max_completion=128)
    encoded = examples.encode_rows(rows, tokenizer, lengths, template=template)
    pairs = batches.Batches(encoded, batch_size=32, seed=0)
    pairs.batch_at(17)  # step 17, today, tomorrow, on one process or on eight

The same rows make prompts for sampling (`rows.map(schema.as_prompt)`) and demonstrations (`rows.map(schema.as_demonstration)`).
"""
