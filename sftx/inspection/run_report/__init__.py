"""`sftx report`: a page and a picture made from the files of one or several run directories.

It reads files only and may import neither torch nor any package of sftx but `config`, `errors`, `events` and
`atomic_files`.
"""
