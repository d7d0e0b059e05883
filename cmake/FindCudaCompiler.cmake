# Finds a CUDA compiler that can build for sm_90a, in this order: CUDACXX or CUDA_HOME, nvcc on
# PATH, the compiler inside NVIDIA's Python wheels (site-packages/nvidia/cu13). Sets
# `out_compiler` to it; or to "", and `out_why_not` to the reason.

function(flashmla_find_cuda_compiler out_compiler out_why_not)
  set(${out_compiler} "" PARENT_SCOPE)
  set(minimum 12.8)

  # Not only what can be imported: pip builds in an environment of its own, to which the packages
  # of the environment that it installs into are hidden.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import sys, sysconfig; print(sysconfig.get_path('purelib'), *sys.path, sep=';')"
    OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)

  set(candidates "")
  if(DEFINED ENV{CUDACXX})
    list(APPEND candidates "$ENV{CUDACXX}")
  endif()
  if(DEFINED ENV{CUDA_HOME})
    list(APPEND candidates "$ENV{CUDA_HOME}/bin/nvcc")
  endif()
  find_program(nvcc_on_path nvcc NO_CACHE NO_DEFAULT_PATH PATHS ENV PATH)
  if(nvcc_on_path)
    list(APPEND candidates "${nvcc_on_path}")
  endif()
  foreach(folder IN LISTS site_packages)
    list(APPEND candidates "${folder}/nvidia/cu13/bin/nvcc")
  endforeach()

  set(why_not "no CUDA compiler was found (looked at CUDACXX, CUDA_HOME, PATH and the nvidia wheels)")
  foreach(candidate IN LISTS candidates)
    if(NOT EXISTS "${candidate}")
      continue()
    endif()
    file(REAL_PATH "${candidate}" nvcc)
    execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET RESULT_VARIABLE rc)
    if(NOT rc EQUAL 0 OR NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
      set(why_not "${candidate} does not run")
      continue()
    endif()
    set(version "${CMAKE_MATCH_1}")
    if(version VERSION_LESS minimum)
      set(why_not "${candidate} is CUDA ${version}; ${minimum} or newer is needed")
      continue()
    endif()
    # nvcc may be a wrapper script elsewhere: the compiler itself knows its root.
    execute_process(COMMAND "${nvcc}" --dryrun -E -x cu /dev/null
                    OUTPUT_QUIET ERROR_VARIABLE dryrun)
    if(NOT dryrun MATCHES "TOP=([^\r\n]+)")
      set(why_not "${candidate} does not tell where its toolkit is")
      continue()
    endif()
    file(REAL_PATH "${CMAKE_MATCH_1}" root)
    if(NOT EXISTS "${root}/lib64" AND EXISTS "${root}/lib")
      # The wheels keep their libraries in lib, where nvcc itself does not look.
      set(ENV{NVCC_APPEND_FLAGS} "$ENV{NVCC_APPEND_FLAGS} -L${root}/lib")
    endif()
    message(STATUS "flashmla_jax: CUDA ${version} (${nvcc})")
    set(${out_compiler} "${nvcc}" PARENT_SCOPE)
    return()
  endforeach()
  set(${out_why_not} "${why_not}" PARENT_SCOPE)
endfunction()
