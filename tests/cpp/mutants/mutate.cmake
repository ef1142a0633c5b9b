# Plants bugs in copies of sources, one at a time, for the tests that must find each of them. The shipped sources know
# nothing of it. A list of bugs begins with sida_mutants(NAME), names its bugs, and ends with sida_write_mutants(), which
# writes the changed copies to build/mutants/NAME/ under the paths that they have in csrc/, and names.cpp beside them.
# Number 0 is the code as it is; `sida::test::mutation` has the number of the bug that is switched on.

# Begins a list of bugs.
macro(sida_mutants list)
  set(sida_mutants ${list})
  set(sida_mutant_files "")
  set(sida_mutant_names "")
endmacro()

# A bug in csrc/FILE. `right` must stand exactly once in the file. If `wrong` contains the word MUTANT it replaces `right`,
# and MUTANT is true while the bug is on; else `right` is statements and `wrong` the statements that stand in their place.
# A bug that needs several changes is named several times.
function(sida_mutation name file right wrong)
  if(NOT file IN_LIST sida_mutant_files)
    file(READ ${PROJECT_SOURCE_DIR}/csrc/${file} sida_mutant_text_${file})
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/${file})
    list(APPEND sida_mutant_files ${file})
  endif()
  set(text "${sida_mutant_text_${file}}")
  string(FIND "${text}" "${right}" first)
  string(FIND "${text}" "${right}" last REVERSE)
  if(first EQUAL -1 OR NOT first EQUAL last)
    message(FATAL_ERROR "mutation ${name}: its text must stand exactly once in ${file}: ${right}")
  endif()
  if(NOT name IN_LIST sida_mutant_names)
    list(APPEND sida_mutant_names "${name}")
  endif()
  list(FIND sida_mutant_names "${name}" before)
  math(EXPR number "${before} + 1")
  set(switched_on "(::sida::test::mutation == ${number})")
  if(wrong MATCHES "MUTANT")
    string(REPLACE "MUTANT" "${switched_on}" changed "${wrong}")
  else()
    set(changed "{ if ${switched_on} { ${wrong} } else { ${right} } }")
  endif()
  string(REPLACE "${right}" "${changed}" text "${text}")
  set(sida_mutant_text_${file} "${text}" PARENT_SCOPE)
  set(sida_mutant_files "${sida_mutant_files}" PARENT_SCOPE)
  set(sida_mutant_names "${sida_mutant_names}" PARENT_SCOPE)
endfunction()

# Ends the list: writes the copies.
function(sida_write_mutants)
  set(folder ${PROJECT_BINARY_DIR}/mutants/${sida_mutants})
  foreach(file ${sida_mutant_files})
    # On a line that is there, so that reports name the lines of the source (as far as changes keep to a line).
    set(content "${sida_mutant_text_${file}}")
    string(FIND "${content}" "\nnamespace sida" at)
    math(EXPR at "${at} + 1")
    string(SUBSTRING "${content}" 0 ${at} before)
    string(SUBSTRING "${content}" ${at} -1 after)
    set(content "${before}namespace sida::test { extern int mutation; }  ${after}")
    file(CONFIGURE OUTPUT ${folder}/${file} @ONLY CONTENT "@content@")
  endforeach()
  list(LENGTH sida_mutant_names count)
  list(JOIN sida_mutant_names "\",\n\"" names)
  file(CONFIGURE OUTPUT ${folder}/names.cpp @ONLY CONTENT [=[
// Made by tests/cpp/mutants/mutate.cmake.
namespace sida::test {
int mutation = 0;
extern const char* const mutation_names[] = {"the code as it is",
"@names@"};
extern const int mutations = @count@;
}
]=])
endfunction()
