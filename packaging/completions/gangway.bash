# Completion of gangway for bash: `gangway __complete` knows the candidates.

_gangway() {
    local line=${COMP_LINE:0:COMP_POINT} words last candidate
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] || ${#words[@]} -eq 1 ]] && words+=('')
    last=${words[-1]}

    COMPREPLY=()
    while IFS= read -r candidate; do
        candidate=${candidate%%$'\t'*}
        case $candidate in
            :files) compopt -o filenames; mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -- "${last#*=}") ;;
            :commands) mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -c -- "$last") ;;
            # bash has split the word at : and =, and replaces what is after the last one only.
            *)
                candidate=${candidate#"${last%"${last##*[:=]}"}"}
                # Names that others have chosen may have characters that the shell would act on.
                [[ $candidate == *[^[:alnum:]_.:/@=,%+-]* ]] && printf -v candidate %q "$candidate"
                COMPREPLY+=("$candidate")
                ;;
        esac
    done < <("$1" __complete "${words[@]:1}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}

complete -F _gangway gangway
