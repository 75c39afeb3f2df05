"""The file format: what `compress` writes and everything else reads. `FORMAT.md` specifies it for other readers.

A container is a plain safetensors file. With plain PQ it holds, per tensor, a codebook and packed assignments
(`pq/NAME/codebook`, `pq/NAME/assignments`), or the tensor itself (`keep/NAME`; small ones lie end to end in
`pqcli.kept`). A codec that takes the whole checkpoint puts all its bytes into `pqcli.coded`. Three more entries say
what it all means:

    pqcli.manifest   zlib-compressed JSON: the source's structure, the recipe, and a `Record` per tensor
    pqcli.hashes     some bytes per record: BLAKE2b of the decoded tensor
    pqcli.errors     4 float32 per quantized record: rms, relative MSE, cosine, largest absolute error

What compression measures (hashes, errors) is kept out of the manifest, so that the size of a plain PQ file is known
before any weight is read: planning, budgets and the writer ask the same layout.

A checksum over every byte of the file stands last (`pqcli.checksum`).

Every later ability is a new named feature; a reader refuses a file whose features it does not know.

    manifest  what a file says of itself, and how that looks as JSON
    layout    manifest -> entries, header and size of the safetensors file
    checksum  what covers every byte
    writer    finished tensors -> file

    limits    what a file may claim
    header    which entries there are, checked
    entries   their bytes
    door      file -> all that it says of itself, checked once
    reader    file -> tensors
    peek      is it one of ours? told without torch
"""
