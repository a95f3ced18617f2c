"""The verbs of the command line, one module each.

A verb is the function of its module's name; the command's options are its parameters. `text(result)` of the module, if
there is one, is what the command prints. Everything the verbs share is in the modules beside this folder.
"""
