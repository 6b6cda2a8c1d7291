"""The scenario `mount`: the same bucket as files through weightstream and through its peers.

Every sample mounts afresh (the kernel keeps nothing of an earlier mount), works on the files in
processes of their own and unmounts. What is compared is what an application waits for: reading,
mapping, stock safetensors, `ls` and `find`.
"""
