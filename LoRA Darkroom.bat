@echo off
rem A double click starts LoRA Darkroom; its words stay readable if it fails.
chcp 65001 >nul
setlocal DisableDelayedExpansion
set "PYTHON="
python -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>nul && set "PYTHON=python"
py -3 -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>nul && set "PYTHON=py -3"
if not defined PYTHON echo LoRA Darkroom needs Python 3.11 or newer: https://www.python.org/downloads/
if not defined PYTHON echo LoRA Darkroom 需要 Python 3.11 或更新版本：https://www.python.org/downloads/
if not defined PYTHON pause
if not defined PYTHON exit /b 2
%PYTHON% "%~dp0launcher.py" %*
if errorlevel 1 pause
