# Completion of gangway for fish: `gangway __complete` knows the candidates.

function __gangway_complete
    set -l typed (commandline --tokenize --cut-at-cursor --current-process)
    set -l last (commandline --current-token --cut-at-cursor)
    set -l option (string match --regex -- '^--[^=]*=' $last)
    for line in ($typed[1] __complete $typed[2..-1] "$last" 2>/dev/null)
        switch $line
            case :files
                for path in (__fish_complete_path (string replace -- "$option" '' $last))
                    echo "$option$path"
                end
            case :commands
                __fish_complete_command
            case '*'
                echo $line
        end
    end
end

complete --command gangway --no-files --arguments '(__gangway_complete)'
