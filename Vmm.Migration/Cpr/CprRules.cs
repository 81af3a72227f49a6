using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Cpr;

/// <summary>Which channels each mode needs (vfio-migration 7; QEMU: <c>migration_channels_and_transport_compatible</c>).</summary>
internal static class CprRules
{
    /// <summary>Checks the channels of an attempt before it starts.</summary>
    /// <exception cref="ConfigurationException">The mode does not allow these channels. The text is QEMU's, if QEMU has one.</exception>
    internal static void Check(MigrationMode mode, MigrationAddress? main, MigrationAddress? cpr, IReadOnlyList<string> execCommand)
    {
        bool isFile = main is null or { Transport: MigrationTransport.File or MigrationTransport.Exec };
        switch (mode)
        {
            case MigrationMode.CprTransfer:
                if (cpr is null) throw new ConfigurationException("missing 'cpr' migration channel");
                if (cpr.Transport != MigrationTransport.Unix) throw new ConfigurationException($"bad cpr channel address {cpr}; must be unix");
                if (main is { Transport: MigrationTransport.File }) throw new ConfigurationException("Migration requires streamable transport (eg unix)");
                if (main is { Transport: MigrationTransport.Tcp, Port: 0 }) throw new ConfigurationException("migration mode 'cpr-transfer' needs a port other than 0");
                return;
            case MigrationMode.CprExec when execCommand.Count == 0:
                throw new ConfigurationException("cpr-exec mode requires setting parameter cpr-exec-command");
            case MigrationMode.CprExec or MigrationMode.CprReboot when !isFile:
                throw new ConfigurationException($"migration mode '{(mode == MigrationMode.CprExec ? "cpr-exec" : "cpr-reboot")}' needs a file: or exec: address, found {main}");
        }
        if (cpr is not null) throw new ConfigurationException("migration channel type 'cpr' needs mode cpr-transfer");
    }
}
