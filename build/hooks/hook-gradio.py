# Gradio and its helpers read their own files; its classes are read as source where gui/window.py
# doesn't keep it from that.
from PyInstaller.utils.hooks import collect_data_files

datas = [pair for package in ("gradio", "gradio_client", "safehttpx", "groovy")
         for pair in collect_data_files(package)]
module_collection_mode = "pyz+py"
